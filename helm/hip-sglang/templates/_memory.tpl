{{/* host memory of one engine pod: the arithmetic of hip_cluster.budget, tested by one table of cases */}}

{{/* pods that share one copy of the model */}}
{{- define "hip.podsPerReplica" -}}
{{- eq .Values.engine.mode "ray" | ternary .Values.engine.nodes 1 -}}
{{- end -}}

{{- define "hip.ranksPerPod" -}}
{{- max 1 (div .Values.engine.tensorParallel (include "hip.podsPerReplica" . | int)) -}}
{{- end -}}

{{/* bytes of KV of one token in one rank */}}
{{- define "hip.kvBytesPerToken" -}}
{{- $shape := .Values.model.shape -}}
{{- $bytes := eq .Values.engine.device "cpu" | ternary 4 2 -}}
{{- if hasPrefix "fp8" .Values.engine.kvCacheDtype }}{{ $bytes = 1 }}{{ end -}}
{{- if eq .Values.engine.kvCacheDtype "bfloat16" }}{{ $bytes = 2 }}{{ end -}}
{{- div (mul $shape.layers $shape.kvHeads 2 $shape.headDim $bytes) .Values.engine.tensorParallel -}}
{{- end -}}

{{/* tokens that a rank's share of engine.offload.hostGiB holds, as hip_sglang.kv.memory counts them:
     whole pages of 64, and one is SGLang's own */}}
{{- define "hip.logicalTokens" -}}
{{- $rank := div (mulf .Values.engine.offload.hostGiB 1073741824 | int64) (include "hip.ranksPerPod" . | int64) -}}
{{- mul 64 (sub (div $rank (mul 64 (include "hip.kvBytesPerToken" . | int64))) 1) -}}
{{- end -}}

{{/* the parts in MiB, each rounded up, as JSON */}}
{{- define "hip.memoryParts" -}}
{{- $engine := .Values.engine -}}
{{- $offload := $engine.offload.enabled | ternary $engine.offload.hostGiB 0 -}}
{{- $staging := mul (include "hip.ranksPerPod" . | int) (include "hip.mib" $engine.memory.stagingGiBPerRank | int64) -}}
{{- dict
  "offload" (include "hip.mib" $offload | int64)
  "staging" $staging
  "shm" (include "hip.mib" $engine.memory.shmGiB | int64)
  "reserve" (include "hip.mib" $engine.memory.reserveGiB | int64) | toJson -}}
{{- end -}}

{{- define "hip.mib" -}}
{{- mulf . 1024 | ceil | int64 -}}
{{- end -}}

{{- define "hip.memoryMiB" -}}
{{- $sum := 0 -}}
{{- range include "hip.memoryParts" . | fromJson | values }}{{ $sum = add $sum (int64 .) }}{{ end -}}
{{- $sum -}}
{{- end -}}

{{- define "hip.gib" -}}
{{- printf "%.1f" (divf . 1024) | trimSuffix ".0" -}}
{{- end -}}

{{- define "hip.memorySum" -}}
{{- $parts := include "hip.memoryParts" . | fromJson -}}
a pod with {{ include "hip.ranksPerPod" . }} of the ranks needs {{ include "hip.gib" (include "hip.memoryMiB" .) }} GiB (offloaded KV {{ include "hip.gib" $parts.offload }}, weights {{ include "hip.gib" $parts.staging }}, /dev/shm {{ include "hip.gib" $parts.shm }}, reserve {{ include "hip.gib" $parts.reserve }})
{{- end -}}
