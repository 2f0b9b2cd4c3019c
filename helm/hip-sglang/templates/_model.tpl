{{- define "hip.downloadEnv" -}}
{{- if eq .Values.model.source "download" }}
- name: HIP_MODEL_PATH
  value: {{ include "hip.modelPath" . }}
- name: HIP_MODEL_REPOSITORY
  value: {{ .Values.model.download.repository }}
- name: HIP_MODEL_REVISION
  value: {{ .Values.model.download.revision | quote }}
- name: HIP_MODEL_PATTERNS
  value: {{ .Values.model.download.allowPatterns | toJson | quote }}
{{- end }}
{{- end -}}

{{- define "hip.scriptsVolume" -}}
{{- if eq .Values.model.source "download" }}
- name: scripts
  configMap:
    name: {{ include "hip.fullname" . }}-scripts
{{- end }}
{{- end -}}

{{- define "hip.modelPod" -}}
{{- $download := .Values.model.download -}}
restartPolicy: OnFailure
{{- include "hip.podCommon" (list . (include "hip.serviceAccount" .)) | nindent 0 }}
automountServiceAccountToken: false
containers:
  - name: download
    image: {{ include "hip.image" . }}
    imagePullPolicy: {{ .Values.image.pullPolicy }}
    command: [python3, /etc/hip-sglang/scripts/model.py, fetch]
    env:
      - name: HOME
        value: /tmp
      {{- with include "hip.downloadEnv" . | trim }}
      {{- . | nindent 6 }}
      {{- end }}
      {{- with $download.endpoint }}
      - name: HF_ENDPOINT
        value: {{ . }}
      {{- end }}
      {{- with $download.existingSecret }}
      - name: HF_TOKEN
        valueFrom:
          secretKeyRef:
            name: {{ . }}
            key: {{ $download.secretKey }}
      {{- end }}
    resources:
      {{- toYaml $download.resources | nindent 6 }}
    securityContext:
      {{- include "hip.containerSecurity" . | nindent 6 }}
    volumeMounts:
      - name: models
        mountPath: /models
      - name: tmp
        mountPath: /tmp
      - name: scripts
        mountPath: /etc/hip-sglang/scripts
        readOnly: true
volumes:
  - name: models
    persistentVolumeClaim:
      claimName: {{ include "hip.claim" . }}
  - name: tmp
    emptyDir: {}
  {{- with include "hip.scriptsVolume" . | trim }}
  {{- . | nindent 2 }}
  {{- end }}
{{- end -}}
