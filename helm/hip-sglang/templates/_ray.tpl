{{/* the parts of a RayCluster; the head orchestrates, rank0 serves, ranks compute */}}

{{/* the document that hip_cluster reads. (list root name) */}}
{{- define "hip.endpoint" -}}
{{- $root := index . 0 -}}
{{- $v := $root.Values -}}
{{- $engine := $v.engine -}}
{{- $arguments := list "--enable-metrics" "--kv-cache-dtype" $engine.kvCacheDtype -}}
{{- with $engine.chunkedPrefillSize }}{{ $arguments = concat $arguments (list "--chunked-prefill-size" (int64 . | toString)) }}{{ end -}}
{{- with $engine.maxRunningRequests }}{{ $arguments = concat $arguments (list "--max-running-requests" (int64 . | toString)) }}{{ end -}}
name: {{ index . 1 }}
model:
  path: {{ include "hip.modelPath" $root }}
  served_name: {{ $v.model.name | quote }}
  context_length: {{ int64 $v.model.contextLength }}
hip:
  preset: {{ $engine.hipConfig.preset | default "balanced" }}
  config: {{ omit $engine.hipConfig "preset" | toJson }}
parallel:
  tp: {{ $engine.tensorParallel }}
  nodes: {{ $engine.nodes }}
  device: {{ $engine.device }}
  serving_resource: hip_rank0
{{- with $engine.offload }}
{{- if .enabled }}
offload:
  host_gib: {{ .hostGiB | float64 }}
  miss_policy: {{ .missPolicy }}
  {{- with .deviceTokens }}
  device_tokens: {{ int64 . }}
  {{- end }}
  {{- with .disk.gib }}
  disk: {path: /kv, gib: {{ float64 . }}}
  {{- end }}
{{- end }}
{{- end }}
memory:
  staging_gib_per_rank: {{ $engine.memory.stagingGiBPerRank | float64 }}
  shm_gib: {{ $engine.memory.shmGiB | float64 }}
  reserve_gib: {{ $engine.memory.reserveGiB | float64 }}
server:
  host: 0.0.0.0
  port: 30000
  arguments: {{ concat $arguments $engine.extraArgs | toJson }}
router:
  mode: {{ $v.router.enabled | ternary "external" "none" }}
auth:
  {{- if include "hip.authSecret" $root }}
  api_key_file: /etc/hip-sglang/auth/key
  {{- end }}
  ray_token: true
supervisor:
  # metrics; its commands want a token that only it knows
  host: 0.0.0.0
  port: 8300
limits:
  startup_s: {{ mul 60 $v.probes.startupMinutes }}.0
  drain_s: {{ $engine.maxRequestSeconds }}.0
{{- end -}}

{{/* (list root component) */}}
{{- define "hip.rayPodMetadata" -}}
{{- $root := index . 0 -}}
metadata:
  labels:
    {{- include "hip.labels" . | nindent 4 }}
    {{- with $root.Values.engine.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    # KubeRay rolls pods when their template changes
    checksum/endpoint: {{ include "hip.endpoint" (list $root "-") | sha256sum }}
    {{- with $root.Values.engine.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}

{{/* Ray's head, and beside it the supervisor, which waits for ranks through Ray alone: it has no
     readiness probe, so nothing that it waits for waits for it. (list root name) */}}
{{- define "hip.rayHead" -}}
{{- $root := index . 0 -}}
{{- include "hip.rayPodMetadata" (list $root "head") }}
spec:
  {{- include "hip.podCommon" (list $root (include "hip.serviceAccount" $root)) | nindent 2 }}
  automountServiceAccountToken: false
  # a driver finds its raylet among the processes that it sees
  shareProcessNamespace: true
  terminationGracePeriodSeconds: {{ include "hip.graceSeconds" $root }}
  {{- with $root.Values.ray.headAffinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: ray-head
      image: {{ include "hip.image" $root }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      ports:
        - name: gcs-server
          containerPort: 6379
          protocol: TCP
        - name: dashboard
          containerPort: 8265
          protocol: TCP
        - name: client
          containerPort: 10001
          protocol: TCP
      env:
        - name: HOME
          value: /tmp
        # a node that is busy is not dead: the supervisor sees a process that ends by itself
        - name: RAY_health_check_timeout_ms
          value: "30000"
        - name: RAY_health_check_failure_threshold
          value: "6"
      resources:
        {{- toYaml $root.Values.ray.headResources | nindent 8 }}
      securityContext:
        {{- include "hip.containerSecurity" $root | nindent 8 }}
      volumeMounts:
        {{- include "hip.raySharedMounts" $root | nindent 8 }}
    - name: supervisor
      image: {{ include "hip.image" $root }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      command: [python3, -m, hip_cluster.serve, /etc/hip-sglang/endpoint/endpoint.yaml]
      ports:
        - name: metrics
          containerPort: 8300
          protocol: TCP
      env:
        - name: HOME
          value: /tmp
        - name: HF_HUB_OFFLINE
          value: "1"
        - name: RAY_ADDRESS
          value: 127.0.0.1:6379
        - name: RAY_AUTH_MODE
          value: token
        # KubeRay gives the token to Ray's own container alone, in a Secret of the cluster's name
        - name: RAY_AUTH_TOKEN
          valueFrom:
            secretKeyRef:
              name: {{ $root.Values.ray.existingAuthSecret | default (index . 1) }}
              key: auth_token
        - name: SGLANG_HEALTH_CHECK_TIMEOUT
          value: {{ $root.Values.probes.healthTimeoutSeconds | quote }}
        {{- with $root.Values.engine.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      resources:
        {{- toYaml $root.Values.ray.supervisorResources | nindent 8 }}
      securityContext:
        {{- include "hip.containerSecurity" $root | nindent 8 }}
      volumeMounts:
        {{- include "hip.raySharedMounts" $root | nindent 8 }}
        - name: endpoint
          mountPath: /etc/hip-sglang/endpoint
          readOnly: true
        {{- with include "hip.authMount" $root | trim }}
        {{- . | nindent 8 }}
        {{- end }}
  volumes:
    # a driver reaches its raylet by sockets in /tmp, and the object store in /dev/shm
    - name: tmp
      emptyDir: {}
    - name: shm
      emptyDir:
        medium: Memory
        sizeLimit: 512Mi
    - name: endpoint
      configMap:
        name: {{ index . 1 }}-endpoint
    {{- with include "hip.authVolume" $root | trim }}
    {{- . | nindent 4 }}
    {{- end }}
{{- end -}}

{{- define "hip.raySharedMounts" -}}
- name: tmp
  mountPath: /tmp
- name: shm
  mountPath: /dev/shm
{{- end -}}

{{/* (list root group) */}}
{{- define "hip.rayWorker" -}}
{{- $root := index . 0 -}}
{{- $serves := eq (index . 1) "rank0" -}}
{{- include "hip.rayPodMetadata" (list $root ($serves | ternary "engine" "ranks")) }}
spec:
  {{- include "hip.podCommon" (list $root (include "hip.serviceAccount" $root)) | nindent 2 }}
  automountServiceAccountToken: false
  {{- include "hip.enginePlacement" $root | trim | nindent 2 }}
  {{- with include "hip.engineInit" $root | trim }}
  initContainers:
    {{- . | nindent 4 }}
  {{- end }}
  containers:
    - name: ray-worker
      image: {{ include "hip.image" $root }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      env:
        {{- include "hip.engineEnv" $root | nindent 8 }}
      {{- if $serves }}
      ports:
        - name: http
          containerPort: 30000
          protocol: TCP
      # SGLang serves here when the supervisor has placed its ranks; it waits for raylets, never for
      # this. The liveness probe is KubeRay's, of the raylet: a rank that dies is the supervisor's
      readinessProbe:
        {{- include "hip.readiness" $root | nindent 8 }}
      {{- end }}
      lifecycle:
        preStop:
          exec:
            command: [sleep, {{ $root.Values.probes.preStopSeconds | quote }}]
      resources:
        {{- include "hip.engineResources" $root | nindent 8 }}
      securityContext:
        {{- include "hip.engineSecurity" $root | nindent 8 }}
      volumeMounts:
        {{- include "hip.engineMounts" $root | nindent 8 }}
  volumes:
    {{- include "hip.engineVolumes" $root | nindent 4 }}
    {{- with include "hip.scriptsVolume" $root | trim }}
    {{- . | nindent 4 }}
    {{- end }}
{{- end -}}
