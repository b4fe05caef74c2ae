{{/* Names and labels. Selectors hold neither version nor chart: they can never change. */}}
{{- define "virtbus.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "virtbus.fullname" -}}
{{- $name := include "virtbus.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "virtbus.selector" -}}
app.kubernetes.io/name: {{ include "virtbus.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "virtbus.labels" -}}
{{ include "virtbus.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "virtbus.podLabels" -}}
{{ include "virtbus.selector" . }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Of (dict "root" . "image" .Values.image). */}}
{{- define "virtbus.image" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ default .root.Chart.AppVersion .image.tag }}
{{- end -}}
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
    path: {{ .Values.kubevirt.podsDir }}
    type: Directory
{{- end }}
{{- if include "virtbus.hostLibvirt" . }}
- name: libvirt
  hostPath:
    path: {{ .Values.libvirt.socketDir }}
    type: Directory
{{- end }}
{{- end -}}

{{- define "virtbus.spoolOwner" -}}
{{- if .Values.kubevirt.enabled }}0:0{{ else }}{{ int64 .Values.runAsUser }}:{{ int64 .Values.runAsGroup }}{{ end -}}
{{- end -}}

{{/* The agents' own, and the doctor's: as whom libvirt is asked. */}}
{{- define "virtbus.agentSecurityContext" -}}
{{- if .Values.kubevirt.enabled }}
{{- /* kubelet's folders are root's, and a pod's socket is its guest's alone: see docs/kubevirt.md. */}}
runAsNonRoot: false
runAsUser: 0
runAsGroup: 0
seccompProfile:
  type: RuntimeDefault
{{- else }}
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
    secretName: {{ .existingSecret }}
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
    secretName: {{ .existingSecret }}
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
