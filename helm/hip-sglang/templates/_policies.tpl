{{/* rules of network policies */}}

{{- define "hip.dns" -}}
- ports:
    - port: 53
      protocol: UDP
    - port: 53
      protocol: TCP
{{- end -}}

{{/* who may talk to the endpoint: the clients named, and this chart's own tests */}}
{{- define "hip.clients" -}}
- {{- with .Values.networkPolicy.clients }}
  from:
    {{- toYaml . | nindent 4 }}
    - podSelector:
        matchLabels:
          {{- include "hip.selector" (list $ "test") | nindent 10 }}
  {{- end }}
  ports:
    - port: http
{{- end -}}

{{/* ranks and head of a RayCluster talk on ports that they choose. (list root from|to) */}}
{{- define "hip.rayPeers" -}}
{{- $root := index . 0 -}}
{{- if eq $root.Values.engine.mode "ray" }}
- {{ index . 1 }}:
    {{- range list "engine" "ranks" "head" }}
    - podSelector:
        matchLabels:
          {{- include "hip.selector" (list $root .) | nindent 10 }}
    {{- end }}
{{- end }}
{{- end -}}

{{/* an engine has its model in a volume, and nobody to call */}}
{{- define "hip.engineEgress" -}}
{{- with include "hip.rayPeers" (list . "to") | trim }}
{{ . }}
{{ include "hip.dns" $ }}
{{- end }}
{{- with .Values.networkPolicy.extraEgress }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* the labels of Prometheus by which this release's series are told from others */}}
{{- define "hip.series" -}}
namespace="{{ .Release.Namespace }}",pod=~"{{ include "hip.fullname" . }}-.+"
{{- end -}}
