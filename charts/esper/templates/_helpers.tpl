{{/* What all templates share: names, labels, images, security contexts and addresses. */}}

{{- define "esper.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "esper.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains (include "esper.name" .) .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "esper.name" .) | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* Labels of every object; of a component's with (list $ "operator"). */}}
{{- define "esper.labels" -}}
{{- $root := index . 0 }}
{{- with $root.Values.commonLabels }}
{{- toYaml . }}
{{ end -}}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: esper
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
{{ include "esper.selector" . }}
{{- end }}

{{/* Labels of pods: without releases, so that another chart alone starts none anew. */}}
{{- define "esper.podLabels" -}}
{{- $root := index . 0 }}
{{- with $root.Values.commonLabels }}
{{- toYaml . }}
{{ end -}}
app.kubernetes.io/part-of: esper
{{ include "esper.selector" . }}
{{- end }}

{{/* Labels that select a component's pods; they never change. */}}
{{- define "esper.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "esper.name" $root }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
{{- with index . 1 }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end }}

{{/* The reference of an image: (list $ "control"). */}}
{{- define "esper.image" -}}
{{- $root := index . 0 }}
{{- $image := index $root.Values.images (index . 1) }}
{{- if $image.digest }}
{{- printf "%s@%s" $image.repository $image.digest }}
{{- else }}
{{- printf "%s:%s" $image.repository (default $root.Chart.AppVersion $image.tag) }}
{{- end }}
{{- end }}

{{/* The fields of a pod that all of them share, under the restricted Pod Security Standard: (list $ values). */}}
{{- define "esper.pod" -}}
{{- $root := index . 0 }}
{{- $values := index . 1 -}}
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  fsGroup: 65532
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with $root.Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "esper.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
readOnlyRootFilesystem: true
runAsNonRoot: true
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* Where a process of Esper leaves what it must: the root is read-only. */}}
{{- define "esper.environment" -}}
- {name: HOME, value: /tmp}
- {name: TMPDIR, value: /tmp}
{{- end }}

{{- define "esper.credentials" -}}
{{- default (printf "%s-credentials" (include "esper.fullname" .)) .Values.credentials.existingSecret }}
{{- end }}

{{- define "esper.hubUrl" -}}
http://{{ include "esper.fullname" . }}-urza.{{ .Release.Namespace }}.svc:8000
{{- end }}

{{- define "esper.redisHost" -}}
{{ include "esper.fullname" . }}-redis.{{ .Release.Namespace }}.svc:6379/0
{{- end }}

{{/* The address of Redis without a user. */}}
{{- define "esper.redisUrl" -}}
{{- if .Values.redis.bundled }}
{{- printf "redis://%s" (include "esper.redisHost" .) }}
{{- else }}
{{- .Values.redis.external.url }}
{{- end }}
{{- end }}

{{- define "esper.redisPort" -}}
{{- $host := (urlParse (include "esper.redisUrl" .)).host }}
{{- regexFind "[0-9]+$" $host | default "6379" }}
{{- end }}

{{/* The namespaces in which the operator has Roles, separated by commas; none: it has a ClusterRole. */}}
{{- define "esper.roleNamespaces" -}}
{{- if .Values.operator.namespaced }}
{{- .Values.operator.namespaces | default (list .Release.Namespace) | join "," }}
{{- end }}
{{- end }}

{{- define "esper.servedNamespaces" -}}
{{- if .Values.operator.namespaced }}
{{- include "esper.roleNamespaces" . }}
{{- else }}
{{- .Values.operator.namespaces | join "," }}
{{- end }}
{{- end }}

{{/* Its Secrets, and its claims, which no session in the same namespace may name. */}}
{{- define "esper.ownSecrets" -}}
{{- $names := list (include "esper.credentials" .) .Values.urza.database.existingSecret .Values.urza.storage.existingSecret }}
{{- if not .Values.redis.bundled }}
{{- $names = append $names .Values.redis.external.existingSecret }}
{{- end }}
{{- compact $names | uniq | join "," }}
{{- end }}

{{- define "esper.ownClaims" -}}
{{- $names := list }}
{{- if include "esper.urzaVolume" . }}
{{- $names = append $names (.Values.urza.persistence.existingClaim | default (printf "%s-urza" (include "esper.fullname" .))) }}
{{- end }}
{{- if .Values.redis.bundled }}
{{- $names = append $names (.Values.redis.persistence.existingClaim | default (printf "%s-redis" (include "esper.fullname" .))) }}
{{- end }}
{{- $names | join "," }}
{{- end }}

{{/* Whether the hub keeps anything on a volume; empty: no. */}}
{{- define "esper.urzaVolume" -}}
{{- if not (and .Values.urza.database.existingSecret .Values.urza.storage.bucket) }}true{{ end }}
{{- end }}

{{/* Settings of a component as YAML: (list base more), the second over the first. */}}
{{- define "esper.settings" -}}
{{- toYaml (mustMergeOverwrite (index . 0) (deepCopy (index . 1))) }}
{{- end }}

{{/* Pods of sessions in any namespace, of these roles: a peer of a NetworkPolicy. */}}
{{- define "esper.sessionPods" -}}
namespaceSelector: {}
podSelector:
  matchExpressions:
    - {key: app.kubernetes.io/managed-by, operator: In, values: [esper-operator]}
    - {key: esper.dev/role, operator: In, values: [{{ join ", " . }}]}
{{- end }}

{{- define "esper.dnsEgress" -}}
- ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
{{- end }}
