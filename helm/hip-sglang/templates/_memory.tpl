{{/* host memory of one engine pod: the arithmetic of hip_cluster.budget, tested by one table of cases */}}

{{/* pods that share one copy of the model */}}
{{- define "hip.podsPerReplica" -}}
{{- eq .Values.engine.mode "ray" | ternary .Values.engine.nodes 1 -}}
{{- end -}}

{{- define "hip.ranksPerPod" -}}
{{- div .Values.engine.tensorParallel (include "hip.podsPerReplica" . | int) -}}
{{- end -}}

{{/* bytes of KV that one token takes, over all ranks of one pod */}}
{{- define "hip.kvBytesPerToken" -}}
{{- $shape := .Values.model.shape -}}
{{- $bytes := eq .Values.engine.device "cpu" | ternary 4 2 -}}
{{- if hasPrefix "fp8" .Values.engine.kvCacheDtype }}{{ $bytes = 1 }}{{ end -}}
{{- if eq .Values.engine.kvCacheDtype "bfloat16" }}{{ $bytes = 2 }}{{ end -}}
{{- div (mul $shape.layers $shape.kvHeads 2 $shape.headDim $bytes) (include "hip.podsPerReplica" . | int) -}}
{{- end -}}

{{/* the terms of the sum in GiB, as JSON: what is not there is 0 */}}
{{- define "hip.memoryTerms" -}}
{{- $engine := .Values.engine -}}
{{- $weights := divf .Values.model.weightsGiB (include "hip.podsPerReplica" . | int) -}}
{{- $kv := $engine.offload.enabled | ternary $engine.offload.hostGiB 0 -}}
{{- dict "hostGiB" $kv "weights" $weights "shmGiB" $engine.memory.shmGiB "reserveGiB" $engine.memory.reserveGiB | toJson -}}
{{- end -}}

{{- define "hip.memoryGiB" -}}
{{- $sum := 0.0 -}}
{{- range include "hip.memoryTerms" . | fromJson | values }}{{ $sum = addf $sum . }}{{ end -}}
{{- $sum -}}
{{- end -}}

{{/* as Kubernetes writes it, rounded up */}}
{{- define "hip.memory" -}}
{{- mulf (include "hip.memoryGiB" . | float64) 1024 | ceil | int64 }}Mi
{{- end -}}

{{- define "hip.memorySum" -}}
{{- $terms := include "hip.memoryTerms" . | fromJson -}}
{{ include "hip.memoryGiB" . }} GiB = {{ range $i, $name := list "hostGiB" "weights" "shmGiB" "reserveGiB" }}{{ if $i }} + {{ end }}{{ $name }} {{ index $terms $name }}{{ end }}
{{- end -}}
