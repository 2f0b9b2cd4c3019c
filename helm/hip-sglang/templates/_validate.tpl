{{/* what the schema cannot say; every problem at once, each with the path of its value */}}
{{- define "hip.problems" -}}
{{- $v := .Values -}}
{{- $engine := $v.engine -}}
{{- $shape := $v.model.shape -}}
{{- $storage := $v.model.storage -}}
{{- $offload := $engine.offload -}}
{{- $ray := eq $engine.mode "ray" -}}
{{- if not $v.image.repository }}
image.repository is not set, and no image is published; build one and name it:
    docker build -f deploy/docker/Dockerfile -t REGISTRY/hip-sglang:{{ .Chart.AppVersion }} . && docker push REGISTRY/hip-sglang:{{ .Chart.AppVersion }}
    helm ... --set image.repository=REGISTRY/hip-sglang
{{- end }}
{{- if and (eq $v.model.source "claim") (not $storage.existingClaim) }}
model.storage.existingClaim is not set: name the PersistentVolumeClaim that holds the model, or set model.source to download
{{- end }}
{{- if eq $v.model.source "download" }}
{{- range list "repository" "revision" }}
{{- if not (index $v.model.download .) }}
model.download.{{ . }} is not set, and model.source is download
{{- end }}
{{- end }}
{{- $pods := mul $engine.replicas (include "hip.podsPerReplica" . | int) }}
{{- if and (not $storage.existingClaim) (gt ($v.autoscaling.enabled | ternary (int $v.autoscaling.maxReplicas) (int $pods)) 1) (not (or (has "ReadWriteMany" $storage.accessModes) (has "ReadOnlyMany" $storage.accessModes))) }}
model.storage.accessModes={{ toJson $storage.accessModes }}: more than one pod mounts the model; use ReadWriteMany
{{- end }}
{{- end }}
{{- if and (eq $v.model.source "builtin") $ray }}
model.source=builtin is written by each pod for itself, and engine.mode=ray has several; use claim or download
{{- end }}
{{- range list "kvHeads" "attentionHeads" }}
{{- $heads := index $shape . | int }}
{{- if and $heads (mod $heads $engine.tensorParallel) }}
engine.tensorParallel={{ $engine.tensorParallel }} does not divide model.shape.{{ . }}={{ $heads }}
{{- end }}
{{- end }}
{{- if and $ray (mod $engine.tensorParallel $engine.nodes) }}
engine.nodes={{ $engine.nodes }} does not divide engine.tensorParallel={{ $engine.tensorParallel }}: every node has as many ranks (GPUs)
{{- end }}
{{- if $offload.enabled }}
{{- if not (and $shape.layers $shape.kvHeads $shape.headDim) }}
model.shape.layers, kvHeads and headDim are needed with engine.offload: copy them from the model's config.json
{{- else }}
{{- $tokens := include "hip.logicalTokens" . | int64 }}
{{- if lt $tokens (int64 $v.model.contextLength) }}
engine.offload.hostGiB={{ $offload.hostGiB }} holds {{ max 0 $tokens }} tokens of KV ({{ include "hip.kvBytesPerToken" . }} bytes each in a rank), and model.contextLength={{ int64 $v.model.contextLength }}; raise the one or lower the other
{{- end }}
{{- end }}
{{- end }}
{{- with $offload.disk }}
{{- if and (or .gib .existingClaim .storageClass) (not (and .gib $offload.enabled)) }}
engine.offload.disk is for KV in host memory: set engine.offload.enabled and engine.offload.disk.gib, or leave it out
{{- end }}
{{- if and .existingClaim .storageClass }}
engine.offload.disk.existingClaim={{ .existingClaim }} and engine.offload.disk.storageClass={{ .storageClass }} contradict each other; give one
{{- end }}
{{- if and .existingClaim (or $ray $v.autoscaling.enabled (gt (int $engine.replicas) 1)) }}
engine.offload.disk.existingClaim={{ .existingClaim }} is of one pod, and there are several; use engine.offload.disk.storageClass
{{- end }}
{{- end }}
{{- if and $engine.memory.limitGiB (gt (include "hip.memoryMiB" . | float64) (mulf $engine.memory.limitGiB 1024)) }}
engine.memory.limitGiB={{ $engine.memory.limitGiB }} is too small: {{ include "hip.memorySum" . }}; raise it or lower a part
{{- end }}
{{- if and $engine.rdma.enabled (not $ray) }}
engine.rdma.enabled is for ranks on several nodes; set engine.mode to ray, or leave it out
{{- end }}
{{- if and $ray (not (.Capabilities.APIVersions.Has "ray.io/v1")) }}
engine.mode=ray needs KubeRay, whose resources (ray.io/v1) this cluster does not have: install it, or render with --api-versions ray.io/v1
{{- end }}
{{- range $path, $given := dict "engine.extraArgs" $engine.extraArgs "router.extraArgs" $v.router.extraArgs }}
{{- range $given }}
{{- $option := regexFind "^--[a-z0-9-]+" . }}
{{- if has $option (list "--api-key" "--admin-api-key" "--control-plane-api-keys" "--tenant-api-key") }}
{{ $path }} holds {{ $option }}: everybody on a node can read arguments; use auth.existingSecret
{{- else if has $option (list "--model-path" "--model" "--served-model-name" "--host" "--port" "--context-length" "--tp-size" "--tp" "--tensor-parallel-size" "--device" "--kv-cache-dtype" "--chunked-prefill-size" "--max-running-requests" "--hip-config" "--hip-preset" "--enable-metrics" "--selector" "--service-discovery" "--service-discovery-port" "--service-discovery-namespace" "--policy" "--prometheus-port" "--request-timeout-secs" "--shutdown-grace-period-secs" "--max-payload-size") }}
{{ $path }} holds {{ $option }}, which the chart sets: change the value that it comes from
{{- end }}
{{- end }}
{{- end }}
{{- range $path, $given := dict "engine.extraEnv" $engine.extraEnv "router.extraEnv" $v.router.extraEnv }}
{{- range $given }}
{{- if and .value (regexMatch "(?i)(api_?key|token|password|secret)$" .name) }}
{{ $path }}: {{ .name }} has its value inline; use valueFrom.secretKeyRef
{{- end }}
{{- end }}
{{- end }}
{{- if and $v.auth.existingSecret $v.auth.generate }}
auth.existingSecret={{ $v.auth.existingSecret }} and auth.generate contradict each other; give one
{{- end }}
{{- if and $v.ingress.enabled (not $v.ingress.host) }}
ingress.host is not set
{{- end }}
{{- if $v.httpRoute.enabled }}
{{- if not $v.httpRoute.gateway }}
httpRoute.gateway is not set: name the Gateway that terminates TLS
{{- end }}
{{- if not (.Capabilities.APIVersions.Has "gateway.networking.k8s.io/v1") }}
httpRoute.enabled needs the Gateway API (gateway.networking.k8s.io/v1), which this cluster does not have
{{- end }}
{{- end }}
{{- if $v.autoscaling.enabled }}
{{- if $ray }}
autoscaling.enabled is for engine.mode=standalone: a RayCluster is scaled by engine.replicas
{{- end }}
{{- if lt (int $v.autoscaling.maxReplicas) (int $v.autoscaling.minReplicas) }}
autoscaling.maxReplicas={{ $v.autoscaling.maxReplicas }} is less than autoscaling.minReplicas={{ $v.autoscaling.minReplicas }}
{{- end }}
{{- if eq $v.autoscaling.kind "keda" }}
{{- if not $v.autoscaling.prometheusAddress }}
autoscaling.prometheusAddress is not set, and autoscaling.kind is keda
{{- end }}
{{- if not (.Capabilities.APIVersions.Has "keda.sh/v1alpha1") }}
autoscaling.kind=keda needs KEDA (keda.sh/v1alpha1), which this cluster does not have; install it, or use hpa
{{- end }}
{{- else if not (.Capabilities.APIVersions.Has "custom.metrics.k8s.io/v1beta1") }}
autoscaling.kind=hpa needs a Prometheus adapter (custom.metrics.k8s.io/v1beta1), which this cluster does not have; install one, or use keda
{{- end }}
{{- end }}
{{- range list "podMonitor" "rules" }}
{{- if and (index $v.monitoring .) (not ($.Capabilities.APIVersions.Has "monitoring.coreos.com/v1")) }}
monitoring.{{ . }} needs the Prometheus operator (monitoring.coreos.com/v1), which this cluster does not have
{{- end }}
{{- end }}
{{- if and $v.monitoring.podMonitor $v.networkPolicy.enabled (not $v.networkPolicy.prometheus) }}
networkPolicy.prometheus is empty, and monitoring.podMonitor is on: say where Prometheus runs, or it may not scrape
{{- end }}
{{- end -}}

{{- define "hip.validate" -}}
{{- with include "hip.problems" . | trim -}}
{{- fail (printf "\n\nThese values cannot be used:\n%s\n" .) -}}
{{- end -}}
{{- end -}}
