{{/* smg's arguments: it finds engines by their labels, and is as patient as the longest request */}}
{{- define "hip.routerArgs" -}}
{{- $v := .Values -}}
- --host
- 0.0.0.0
- --port
- "8000"
- --health-check-port
- "8001"
- --prometheus-port
- "29000"
- --policy
- {{ $v.router.policy }}
- --service-discovery
- --service-discovery-namespace
- {{ .Release.Namespace }}
- --service-discovery-port
- "30000"
- --selector
- app.kubernetes.io/name={{ include "hip.name" . }}
- app.kubernetes.io/instance={{ .Release.Name }}
- app.kubernetes.io/component=engine
- --health-check-timeout-secs
- {{ add $v.probes.healthTimeoutSeconds 5 | quote }}
- --request-timeout-secs
- {{ $v.engine.maxRequestSeconds | int64 | quote }}
- --shutdown-grace-period-secs
- {{ $v.engine.maxRequestSeconds | int64 | quote }}
- --max-payload-size
- {{ include "hip.bodyBytes" . | quote }}
- --max-buffered-request-bytes
- {{ include "hip.bodyBytes" . | quote }}
{{- range $v.router.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end -}}
