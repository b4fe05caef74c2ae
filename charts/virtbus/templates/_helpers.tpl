{{/* Fills in what is null, and what a release before did not have: see files/defaults.yaml. First in each file. */}}
{{- define "virtbus.defaults" -}}
{{- include "virtbus.fill" (dict "values" .Values "defaults" (.Files.Get "files/defaults.yaml" | fromYaml)) -}}
{{- end -}}

{{- define "virtbus.fill" -}}
{{- range $key, $default := .defaults -}}
{{- $value := get $.values $key -}}
{{- if or (not (hasKey $.values $key)) (kindIs "invalid" $value) -}}
{{- $_ := set $.values $key $default -}}
{{- else if and (kindIs "map" $default) (kindIs "map" $value) -}}
{{- include "virtbus.fill" (dict "values" $value "defaults" $default) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Names and labels. Selectors hold neither version nor chart: they can never change. */}}
{{- define "virtbus.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "virtbus.fullname" -}}
{{- $name := include "virtbus.name" . -}}
{{- $full := printf "%s-%s" .Release.Name $name -}}
{{- if .Values.fullnameOverride -}}
{{- $full = .Values.fullnameOverride -}}
{{- else if contains $name .Release.Name -}}
{{- $full = .Release.Name -}}
{{- end -}}
{{- include "virtbus.label" $full -}}
{{- end -}}

{{/* A DNS label, as Services need it: no dot, a letter first, and long names stay different when cut. */}}
{{- define "virtbus.label" -}}
{{- $label := replace "." "-" . -}}
{{- if not (regexMatch "^[a-z]" $label) }}{{ $label = printf "vb-%s" $label }}{{ end -}}
{{- if gt (len $label) 48 -}}
{{- printf "%s-%s" ($label | trunc 39 | trimSuffix "-") ($label | sha256sum | trunc 8) -}}
{{- else -}}
{{- $label -}}
{{- end -}}
{{- end -}}

{{- define "virtbus.selector" -}}
app.kubernetes.io/name: {{ include "virtbus.name" .root | quote }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* Of (dict "root" . "component" … "own" .Values.…): each key once, the selector's first, then those of this object. */}}
{{- define "virtbus.labels" -}}
{{- $chart := printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" -}}
{{- $by := dict "app.kubernetes.io/managed-by" .root.Release.Service "helm.sh/chart" $chart -}}
{{- $_ := set $by "app.kubernetes.io/version" .root.Chart.AppVersion -}}
{{- merge (include "virtbus.podLabels" . | fromYaml) $by | toYaml -}}
{{- end -}}

{{- define "virtbus.podLabels" -}}
{{- merge (include "virtbus.selector" . | fromYaml) (default dict .own) .root.Values.commonLabels | toYaml -}}
{{- end -}}

{{/* The annotations of an object: the common ones and those of (dict "root" . "own" .Values.…). */}}
{{- define "virtbus.annotations" -}}
{{- with merge (dict) (default dict .own) .root.Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Those of a pod: what it was made from, its own ones, the common ones. Of (dict "root" . "config" … "own" …). */}}
{{- define "virtbus.podAnnotations" -}}
{{- $sums := dict "checksum/config" (sha256sum .config) "checksum/secrets" (include "virtbus.secretsChecksum" .root) -}}
{{- merge $sums .own .root.Values.commonAnnotations | toYaml -}}
{{- end -}}

{{/* Of (dict "root" . "image" .Values.image). global.imageRegistry takes the place of the registry's host. */}}
{{- define "virtbus.image" -}}
{{- $repository := .image.repository -}}
{{- with .root.Values.global.imageRegistry -}}
{{- $host := first (splitList "/" $repository) -}}
{{- if and (contains "/" $repository) (or (contains "." $host) (contains ":" $host) (eq $host "localhost")) -}}
{{- $repository = trimPrefix (printf "%s/" $host) $repository -}}
{{- end -}}
{{- $repository = printf "%s/%s" (trimSuffix "/" .) $repository -}}
{{- end -}}
{{- if .image.digest -}}
{{ $repository }}@{{ .image.digest }}
{{- else -}}
{{ $repository }}:{{ default .root.Chart.AppVersion .image.tag }}
{{- end -}}
{{- end -}}

{{/* What every pod has: secrets to pull with, names, and an operating system. Of (dict "root" . "nodes"
     its own nodeSelector). */}}
{{- define "virtbus.podCommon" -}}
{{- $secrets := .root.Values.imagePullSecrets -}}
{{- range .root.Values.global.imagePullSecrets }}
{{- $secrets = append $secrets (ternary (dict "name" .) . (kindIs "string" .)) -}}
{{- end }}
{{- with $secrets }}
imagePullSecrets:
  {{- toYaml (uniq .) | nindent 2 }}
{{- end }}
{{- with .root.Values.hostAliases }}
hostAliases:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.dnsPolicy }}
dnsPolicy: {{ . }}
{{- end }}
{{- with .root.Values.dnsConfig }}
dnsConfig:
  {{- toYaml . | nindent 2 }}
{{- end }}
nodeSelector:
  {{- merge (dict) .nodes (dict "kubernetes.io/os" "linux") | toYaml | nindent 2 }}
{{- end -}}

{{/* The key of the taint that `virtbus react` sets. */}}
{{- define "virtbus.taint" -}}
{{- dig "react" "kubernetes" "taint" "virtbus.io/storage-unhealthy" .Values.config -}}
{{- end -}}

{{/* Where agents may run: on a node that `virtbus react` has marked, too. */}}
{{- define "virtbus.agentTolerations" -}}
- {key: {{ include "virtbus.taint" . | quote }}, operator: Exists}
{{- with .Values.tolerations }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "virtbus.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{ default (include "virtbus.fullname" .) .Values.serviceAccount.name }}
{{- else -}}
{{ default "default" .Values.serviceAccount.name }}
{{- end -}}
{{- end -}}

{{- define "virtbus.grace" -}}
{{- $drain := dig "drain_seconds" 10 .Values.config -}}
{{- if kindIs "invalid" .Values.terminationGracePeriodSeconds -}}
{{ add (ceil $drain | int64) 20 }}
{{- else -}}
{{ int64 .Values.terminationGracePeriodSeconds }}
{{- end -}}
{{- end -}}

{{/* ------------------------------------------------------------- the agent's settings as TOML */}}

{{- define "virtbus.tomlKey" -}}
{{- if regexMatch "^[A-Za-z0-9_-]+$" . }}{{ . }}{{ else }}{{ toJson . }}{{ end -}}
{{- end -}}

{{/* YAML's numbers all arrive as floats; a whole one must not be written as 1e+06. */}}
{{- define "virtbus.tomlValue" -}}
{{- if kindIs "slice" . -}}
[{{ range $index, $item := . }}{{ if $index }}, {{ end }}{{ include "virtbus.tomlValue" $item }}{{ end }}]
{{- else if kindIs "map" . -}}
{{- $pairs := list -}}
{{- range $key, $item := . }}{{ if not (kindIs "invalid" $item) }}{{ $pairs = append $pairs (printf "%s = %s" (include "virtbus.tomlKey" $key) (include "virtbus.tomlValue" $item)) }}{{ end }}{{ end -}}
{ {{ join ", " $pairs }} }
{{- else if and (kindIs "float64" .) (eq (floor .) .) -}}
{{ int64 . }}
{{- else -}}
{{ toJson . }}
{{- end -}}
{{- end -}}

{{- define "virtbus.toml" -}}
{{- range $key, $value := .tree }}
{{- if not (or (kindIs "map" $value) (kindIs "invalid" $value)) }}
{{ include "virtbus.tomlKey" $key }} = {{ include "virtbus.tomlValue" $value }}
{{- end }}
{{- end }}
{{- $path := .path }}
{{- range $key, $value := .tree }}
{{- if and (kindIs "map" $value) $value }}
{{- $name := printf "%s%s" $path (include "virtbus.tomlKey" $key) }}

[{{ $name }}]
{{- include "virtbus.toml" (dict "path" (printf "%s." $name) "tree" $value) }}
{{- end }}
{{- end }}
{{- end -}}

{{/* `config` from the values, and what only the chart knows: where it mounts things. Of (dict "root" .
     "component" "agent"): agents know nothing of `react`, so that its settings restart none of them. */}}
{{- define "virtbus.config" -}}
{{- $values := .root.Values -}}
{{- $tls := dict -}}
{{- with $values.bus.tls -}}
{{- if .existingSecret -}}
{{- if .caKey }}{{ $_ := set $tls "ca_file" "/run/secrets/virtbus/tls/ca.crt" }}{{ end -}}
{{- if .certKey }}{{ $_ := set $tls "cert_file" "/run/secrets/virtbus/tls/tls.crt" }}{{ end -}}
{{- if .keyKey }}{{ $_ := set $tls "key_file" "/run/secrets/virtbus/tls/tls.key" }}{{ end -}}
{{- end -}}
{{- end -}}
{{- $bus := dict "tls" $tls "url_file" "/run/secrets/virtbus/bus/url" -}}
{{- if $values.bus.passwordKey }}{{ $_ := set $bus "password_file" "/run/secrets/virtbus/bus/password" }}{{ end -}}
{{- $owned := dict "state_dir" "/var/lib/virtbus" "bus" $bus -}}
{{- $config := deepCopy $values.config -}}
{{- if eq .component "agent" -}}
{{- $config = omit $config "react" -}}
{{- $_ := set $owned "http" (dict "listen" (printf "%s:%d" $values.http.host (int64 $values.http.port))) -}}
{{- $_ := set $owned "control" (dict "socket" "/run/virtbus/control.sock") -}}
{{- if not (or $values.nodeSelector $values.affinity) -}}
{{- $libvirt := default dict $config.libvirt -}}
{{- if not (hasKey $libvirt "optional") }}{{ $config = set $config "libvirt" (set $libvirt "optional" true) }}{{ end -}}
{{- end -}}
{{- else -}}
{{- $_ := set $owned "react" (dict "listen" (printf "%s:%d" $values.http.host (int64 $values.react.http.port))) -}}
{{- end -}}
{{- include "virtbus.toml" (dict "path" "" "tree" (mergeOverwrite $config $owned)) | trim }}
{{ end -}}

{{/* Changes when the content of a Secret in use changes. Only a server can tell: without one (template,
     GitOps tools that render) only the names count, and a new bus URL needs a restart by hand. */}}
{{- define "virtbus.secretsChecksum" -}}
{{- $seen := dict -}}
{{- range $name := compact (list .Values.bus.existingSecret .Values.bus.tls.existingSecret) -}}
{{- $found := lookup "v1" "Secret" $.Release.Namespace $name -}}
{{- $_ := set $seen $name (default dict (get (default dict $found) "data")) -}}
{{- end -}}
{{- toJson $seen | sha256sum -}}
{{- end -}}

{{/* ------------------------------------------------------------------- pieces of the pods */}}

{{- define "virtbus.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: {{ int64 .user }}
runAsGroup: {{ int64 .group }}
fsGroup: {{ int64 .group }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* Not empty: the host's own libvirt is observed. */}}
{{- define "virtbus.hostLibvirt" -}}
{{- if or (not .Values.kubevirt.enabled) .Values.kubevirt.withLibvirt }}yes{{ end -}}
{{- end -}}

{{- define "virtbus.agentEnv" -}}
{{- if .Values.kubevirt.enabled -}}
- name: VIRTBUS_LIBVIRT__DISCOVER__PRESET
  value: kubevirt
- name: VIRTBUS_LIBVIRT__DISCOVER__HOST
  valueFrom:
    fieldRef:
      fieldPath: spec.nodeName
{{- if .Values.kubevirt.withLibvirt }}
- name: VIRTBUS_LIBVIRT__DISCOVER__WITH_URI
  value: "true"
{{- end }}
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "virtbus.libvirtMounts" -}}
{{- if .Values.kubevirt.enabled -}}
- name: pods
  mountPath: /var/lib/kubelet/pods
  readOnly: true
  mountPropagation: HostToContainer
{{- end }}
{{- if include "virtbus.hostLibvirt" . }}
# The folder, never the socket: a bind of the file goes stale when libvirt restarts.
- name: libvirt
  mountPath: /run/libvirt
  readOnly: true
{{- end }}
{{- end -}}

{{- define "virtbus.libvirtVolumes" -}}
{{- if .Values.kubevirt.enabled -}}
- name: pods
  hostPath:
    path: {{ .Values.kubevirt.podsDir | quote }}
    type: Directory
{{- end }}
{{- if include "virtbus.hostLibvirt" . }}
- name: libvirt
  hostPath:
    path: {{ .Values.libvirt.socketDir | quote }}
    type: DirectoryOrCreate  # a node without libvirt gets a pod that runs and says so
{{- end }}
{{- end -}}

{{- define "virtbus.spoolOwner" -}}
{{- if .Values.kubevirt.enabled }}0:0{{ else }}{{ int64 .Values.runAsUser }}:{{ int64 .Values.runAsGroup }}{{ end -}}
{{- end -}}

{{/* The agents' own, and the doctor's: as whom libvirt is asked. */}}
{{- define "virtbus.agentSecurityContext" -}}
{{- if .Values.kubevirt.enabled -}}
{{- /* kubelet's folders are root's, and a pod's socket is its guest's alone: see docs/kubevirt.md. */ -}}
runAsNonRoot: false
runAsUser: 0
runAsGroup: 0
seccompProfile:
  type: RuntimeDefault
{{- else -}}
{{ include "virtbus.podSecurityContext" (dict "user" .Values.runAsUser "group" .Values.runAsGroup) }}
{{- end }}
{{- with .Values.libvirt.groups }}
supplementalGroups: {{ toJson . }}
{{- end }}
{{- with .Values.seLinuxOptions }}
seLinuxOptions:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "virtbus.containerSecurityContext" -}}
allowPrivilegeEscalation: false
privileged: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "virtbus.secretMounts" -}}
{{- if .Values.bus.existingSecret -}}
- name: bus
  mountPath: /run/secrets/virtbus/bus
  readOnly: true
{{- end }}
{{- if .Values.bus.tls.existingSecret }}
- name: tls
  mountPath: /run/secrets/virtbus/tls
  readOnly: true
{{- end }}
{{- end -}}

{{- define "virtbus.secretVolumes" -}}
{{- with .Values.bus -}}
{{- if .existingSecret -}}
- name: bus
  secret:
    secretName: {{ .existingSecret | quote }}
    defaultMode: 0440
    items:
      - {key: {{ .urlKey | quote }}, path: url}
      {{- if .passwordKey }}
      - {key: {{ .passwordKey | quote }}, path: password}
      {{- end }}
{{- end }}
{{- with .tls }}
{{- if .existingSecret }}
- name: tls
  secret:
    secretName: {{ .existingSecret | quote }}
    defaultMode: 0440
    items:
      {{- if .caKey }}
      - {key: {{ .caKey | quote }}, path: ca.crt}
      {{- end }}
      {{- if .certKey }}
      - {key: {{ .certKey | quote }}, path: tls.crt}
      - {key: {{ .keyKey | quote }}, path: tls.key}
      {{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{/* One endpoint of a PodMonitor or ServiceMonitor. Of (dict "root" . "values" .Values.podMonitor "component" …). */}}
{{- define "virtbus.monitor" -}}
{{- $values := .values -}}
{{- $root := .root -}}
{{- $component := .component -}}
- port: metrics
  path: /metrics
  interval: {{ $values.interval }}
  relabelings:
    # Pods come and go: an alert names the node.
    - sourceLabels: [__meta_kubernetes_pod_node_name]
      targetLabel: node
    - sourceLabels: [__meta_kubernetes_pod_node_name]
      targetLabel: instance
    {{- if eq $component "react" }}
    - targetLabel: job
      replacement: {{ include "virtbus.name" $root }}-react
    {{- end }}
    {{- with $values.relabelings }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with $values.metricRelabelings }}
  metricRelabelings:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}
