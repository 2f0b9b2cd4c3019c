{{/* names, labels and images */}}

{{- define "hip.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 36 | trimSuffix "-" -}}
{{- end -}}

{{/* 36 characters: with a replica's number 40, as many as hip_cluster takes; KubeRay adds its own */}}
{{- define "hip.fullname" -}}
{{- $name := include "hip.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 36 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 36 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 36 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* what selects pods: a subset of the labels, which an upgrade never changes. (list root component) */}}
{{- define "hip.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "hip.name" $root }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{/* (list root component) */}}
{{- define "hip.labels" -}}
{{- $root := index . 0 -}}
{{ include "hip.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
app.kubernetes.io/part-of: hip-sglang
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "hip.metadata" -}}
{{- $root := index . 0 -}}
name: {{ include "hip.fullname" $root }}{{ with index . 2 }}-{{ . }}{{ end }}
namespace: {{ $root.Release.Namespace }}
labels:
  {{- include "hip.labels" . | nindent 2 }}
{{- end -}}

{{- define "hip.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ $image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "hip.serviceAccount" -}}
{{- .Values.serviceAccountName | default (include "hip.fullname" .) -}}
{{- end -}}

{{/* the component whose pods answer requests of clients */}}
{{- define "hip.door" -}}
{{- .Values.router.enabled | ternary "router" "engine" -}}
{{- end -}}

{{- define "hip.authSecret" -}}
{{- if .Values.auth.generate -}}
{{ include "hip.fullname" . }}-api-key
{{- else -}}
{{ .Values.auth.existingSecret }}
{{- end -}}
{{- end -}}

{{- define "hip.authKey" -}}
{{- .Values.auth.generate | ternary "api-key" .Values.auth.secretKey -}}
{{- end -}}

{{- define "hip.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ int64 .Values.securityContext.runAsUser }}
runAsGroup: {{ int64 .Values.securityContext.runAsGroup }}
fsGroup: {{ int64 .Values.securityContext.runAsGroup }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "hip.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* what every pod says the same. (list root serviceAccount) */}}
{{- define "hip.podCommon" -}}
{{- $root := index . 0 -}}
serviceAccountName: {{ index . 1 }}
{{- with $root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
enableServiceLinks: false
securityContext:
  {{- include "hip.podSecurity" $root | nindent 2 }}
{{- end -}}

{{/* the API key, as a file: never an argument, which everybody on the machine can read */}}
{{- define "hip.authEnv" -}}
{{- if include "hip.authSecret" . }}
- name: HIP_SGLANG_API_KEY_FILE
  value: /etc/hip-sglang/auth/key
{{- end }}
{{- end -}}

{{- define "hip.authMount" -}}
{{- if include "hip.authSecret" . }}
- name: auth
  mountPath: /etc/hip-sglang/auth
  readOnly: true
{{- end }}
{{- end -}}

{{- define "hip.authVolume" -}}
{{- with include "hip.authSecret" . }}
- name: auth
  secret:
    secretName: {{ . }}
    defaultMode: 0440
    items:
      - key: {{ include "hip.authKey" $ }}
        path: key
{{- end }}
{{- end -}}
