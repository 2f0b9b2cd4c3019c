{{/* what an engine's pod is made of, in both modes */}}

{{- define "hip.modelPath" -}}
/models/{{ .Values.model.storage.path }}
{{- end -}}

{{- define "hip.claim" -}}
{{- .Values.model.storage.existingClaim | default (printf "%s-model" (include "hip.fullname" .)) -}}
{{- end -}}

{{/* HipConfig as JSON: engine.hipConfig, and engine.offload in its words */}}
{{- define "hip.config" -}}
{{- $config := deepCopy .Values.engine.hipConfig -}}
{{- $offload := .Values.engine.offload -}}
{{- if $offload.enabled -}}
{{- $keys := dict "host_gib" $offload.hostGiB "miss_policy" $offload.missPolicy -}}
{{- with $offload.deviceTokens }}{{ $_ := set $keys "device_tokens" . }}{{ end -}}
{{- with $offload.disk.gib }}{{ $_ := set $keys "disk" (dict "path" "/kv" "gib" .) }}{{ end -}}
{{- $_ := set $config "offload" $keys -}}
{{- end -}}
{{- toJson $config -}}
{{- end -}}

{{/* the largest body of a request: JSON of a prompt, and of its token ids, stays under 16 bytes a token */}}
{{- define "hip.bodyBytes" -}}
{{- max 16777216 (mul 16 .Values.model.contextLength) -}}
{{- end -}}

{{/* a client's connection, a router and a pod that goes wait as long as the longest request */}}
{{- define "hip.graceSeconds" -}}
{{- add .Values.engine.maxRequestSeconds .Values.probes.preStopSeconds 30 -}}
{{- end -}}

{{- define "hip.engineArgs" -}}
{{- $v := .Values -}}
- --model-path
- {{ include "hip.modelPath" . }}
- --served-model-name
- {{ $v.model.name | quote }}
- --host
- 0.0.0.0
- --port
- "30000"
- --device
- {{ $v.engine.device }}
- --tp-size
- {{ $v.engine.tensorParallel | quote }}
- --context-length
- {{ $v.model.contextLength | int64 | quote }}
- --kv-cache-dtype
- {{ $v.engine.kvCacheDtype }}
{{- with $v.engine.chunkedPrefillSize }}
- --chunked-prefill-size
- {{ . | int64 | quote }}
{{- end }}
{{- with $v.engine.maxRunningRequests }}
- --max-running-requests
- {{ . | int64 | quote }}
{{- end }}
- --enable-metrics
- --hip-config
- {{ include "hip.config" . | quote }}
{{- range $v.engine.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end -}}

{{- define "hip.engineEnv" -}}
- name: HOME
  value: /cache
- name: HF_HUB_OFFLINE
  value: "1"
- name: SGLANG_HEALTH_CHECK_TIMEOUT
  value: {{ .Values.probes.healthTimeoutSeconds | quote }}
{{- with .Values.engine.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "hip.engineMounts" -}}
- name: models
  mountPath: /models
  readOnly: true
- name: tmp
  mountPath: /tmp
- name: cache
  mountPath: /cache
- name: shm
  mountPath: /dev/shm
{{- if .Values.engine.offload.disk.gib }}
- name: kv
  mountPath: /kv
{{- end }}
{{- with .Values.engine.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* files and what a file system takes beside them */}}
{{- define "hip.diskMiB" -}}
{{- mulf .Values.engine.offload.disk.gib 1024 1.05 | ceil | int64 -}}
{{- end -}}

{{/* an emptyDir's bytes are the node's own, and the scheduler counts what is asked for */}}
{{- define "hip.diskOfNode" -}}
{{- with .Values.engine.offload.disk }}{{ if and .gib (not .existingClaim) (not .storageClass) }}yes{{ end }}{{ end -}}
{{- end -}}

{{- define "hip.engineVolumes" -}}
{{- $engine := .Values.engine -}}
- name: models
  {{- if eq .Values.model.source "builtin" }}
  emptyDir:
    sizeLimit: 1Gi
  {{- else }}
  persistentVolumeClaim:
    claimName: {{ include "hip.claim" . }}
    readOnly: true
  {{- end }}
- name: tmp
  emptyDir: {}
- name: cache
  {{- if $engine.cache.existingClaim }}
  persistentVolumeClaim:
    claimName: {{ $engine.cache.existingClaim }}
  {{- else }}
  emptyDir:
    sizeLimit: {{ $engine.cache.sizeLimit }}
  {{- end }}
- name: shm
  emptyDir:
    medium: Memory
    sizeLimit: {{ include "hip.mib" $engine.memory.shmGiB }}Mi
{{- with $engine.offload.disk }}
{{- if .gib }}
- name: kv
  {{- if .existingClaim }}
  persistentVolumeClaim:
    claimName: {{ .existingClaim }}
  {{- else if .storageClass }}
  ephemeral:
    volumeClaimTemplate:
      spec:
        accessModes: [ReadWriteOnce]
        storageClassName: {{ .storageClass }}
        resources:
          requests:
            storage: {{ include "hip.diskMiB" $ }}Mi
  {{- else }}
  emptyDir:
    sizeLimit: {{ include "hip.diskMiB" $ }}Mi
  {{- end }}
{{- end }}
{{- end }}
{{- with $engine.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* pods that wait for their model before they start, or write it */}}
{{- define "hip.engineInit" -}}
{{- $source := .Values.model.source -}}
{{- if ne $source "claim" }}
- name: model
  image: {{ include "hip.image" . }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  {{- if eq $source "builtin" }}
  command: [hip-sglang, demo, model, {{ include "hip.modelPath" . }}]
  {{- else }}
  command: [python3, /etc/hip-sglang/scripts/model.py, wait]
  {{- end }}
  env:
    - name: HOME
      value: /tmp
    {{- with include "hip.downloadEnv" . | trim }}
    {{- . | nindent 4 }}
    {{- end }}
  volumeMounts:
    - name: models
      mountPath: /models
    - name: tmp
      mountPath: /tmp
    {{- if eq $source "download" }}
    - name: scripts
      mountPath: /etc/hip-sglang/scripts
      readOnly: true
    {{- end }}
  resources:
    requests: {cpu: "1", memory: 1Gi}
    limits: {memory: 1Gi}
  securityContext:
    {{- include "hip.containerSecurity" . | nindent 4 }}
{{- end }}
{{- end -}}

{{- define "hip.engineResources" -}}
{{- $engine := .Values.engine -}}
requests:
  cpu: {{ $engine.cpu | quote }}
  memory: {{ include "hip.memoryMiB" . }}Mi
  {{- if include "hip.diskOfNode" . }}
  ephemeral-storage: {{ include "hip.diskMiB" . }}Mi
  {{- end }}
limits:
  memory: {{ include "hip.memoryMiB" . }}Mi
  {{- if eq $engine.device "cuda" }}
  {{ $engine.gpuResource }}: {{ include "hip.ranksPerPod" . | quote }}
  {{- end }}
  {{- if $engine.rdma.enabled }}
  {{ $engine.rdma.resource }}: {{ $engine.rdma.count | quote }}
  {{- end }}
{{- end -}}

{{- define "hip.engineSecurity" -}}
{{- include "hip.containerSecurity" . }}
{{- if or .Values.engine.memory.lock .Values.engine.rdma.enabled }}
  add: [IPC_LOCK]
{{- end }}
{{- end -}}

{{- define "hip.healthGet" -}}
httpGet:
  path: /health
  port: http
{{- end -}}

{{- define "hip.readiness" -}}
{{ include "hip.healthGet" . }}
periodSeconds: {{ .Values.probes.readiness.periodSeconds }}
timeoutSeconds: {{ .Values.probes.readiness.timeoutSeconds }}
failureThreshold: {{ .Values.probes.readiness.failureThreshold }}
{{- end -}}

{{- define "hip.enginePlacement" -}}
{{- $engine := .Values.engine -}}
{{- with $engine.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if or $engine.tolerations (eq $engine.device "cuda") }}
tolerations:
  {{- if eq $engine.device "cuda" }}
  - key: {{ $engine.gpuResource }}
    operator: Exists
    effect: NoSchedule
  {{- end }}
  {{- with $engine.tolerations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
{{- with $engine.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $engine.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $engine.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
terminationGracePeriodSeconds: {{ include "hip.graceSeconds" . }}
{{- end -}}

{{/* copies on different machines where that can be had. (list root component) */}}
{{- define "hip.spread" -}}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "hip.selector" . | nindent 8 }}
{{- end -}}
