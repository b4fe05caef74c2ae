{{/* Values that are each right but contradict each other. Each message says what to change. */}}
{{- define "virtbus.checks" -}}
{{- $owned := dict
      "VIRTBUS_BUS__URL" "bus.existingSecret"
      "VIRTBUS_BUS__URL_FILE" "bus.existingSecret"
      "VIRTBUS_STATE_DIR" "spool"
      "VIRTBUS_HTTP__LISTEN" "http"
      "VIRTBUS_REACT__LISTEN" "react.http"
      "VIRTBUS_CONTROL__SOCKET" "the chart: probes and helm test rely on it" -}}
{{- if .Values.bus.passwordKey -}}
{{- $_ := set $owned "VIRTBUS_BUS__PASSWORD_FILE" "bus.passwordKey" -}}
{{- end -}}
{{- if not .Values.bus.existingSecret -}}
{{- fail "\n\nbus.existingSecret is empty: the agent needs to know its broker. Make a Secret with the URL and name it:\n  kubectl create secret generic virtbus-bus --from-literal=url='amqps://user:password@broker:5671//'\n  helm … --set bus.existingSecret=virtbus-bus" -}}
{{- end -}}
{{- range $where := list "extraEnv" "react.extraEnv" -}}
{{- $list := ternary $.Values.extraEnv $.Values.react.extraEnv (eq $where "extraEnv") -}}
{{- range $list -}}
{{- if hasKey $owned .name -}}
{{- fail (printf "\n\n%s sets %s, which belongs to %s" $where .name (get $owned .name)) -}}
{{- end -}}
{{- if and (regexMatch "(?i)pass|secret|token|credential" .name) (not (hasSuffix "_FILE" .name)) (hasKey . "value") -}}
{{- fail (printf "\n\n%s: %s looks like a secret and stands in plain text; use valueFrom.secretKeyRef" $where .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- with .Values.bus.tls -}}
{{- if ne (empty .certKey) (empty .keyKey) -}}
{{- fail "\n\nbus.tls.certKey and bus.tls.keyKey go together: set both, or neither" -}}
{{- end -}}
{{- if and .certKey (not .existingSecret) -}}
{{- fail "\n\nbus.tls.certKey names a key of a Secret, but bus.tls.existingSecret is empty" -}}
{{- end -}}
{{- if and .existingSecret (not .caKey) (not .certKey) -}}
{{- fail "\n\nbus.tls.existingSecret is set, but neither bus.tls.caKey nor bus.tls.certKey: nothing of it would be used" -}}
{{- end -}}
{{- end -}}
{{- if and (eq (dig "bus" "auth" "plain" .Values.config) "external") (not .Values.bus.tls.certKey) -}}
{{- fail "\n\nconfig.bus.auth is external, which needs a client certificate: set bus.tls.existingSecret, certKey and keyKey" -}}
{{- end -}}
{{- $drain := dig "drain_seconds" 10 .Values.config -}}
{{- if lt (include "virtbus.grace" . | int64) (add (ceil $drain | int64) 10) -}}
{{- fail (printf "\n\nterminationGracePeriodSeconds = %s is too short: draining may take config.drain_seconds = %v, and 10 more to end; leave it unset, or make it at least %d" (include "virtbus.grace" .) $drain (add (ceil $drain | int64) 10)) -}}
{{- end -}}
{{- $first := dig "incidents" "first_window_seconds" 1 .Values.config -}}
{{- $last := dig "incidents" "max_window_seconds" 60 .Values.config -}}
{{- if lt (float64 $last) (float64 $first) -}}
{{- fail "\n\nconfig.incidents.max_window_seconds is less than config.incidents.first_window_seconds" -}}
{{- end -}}
{{- if and .Values.podMonitor.enabled .Values.serviceMonitor.enabled -}}
{{- fail "\n\npodMonitor.enabled and serviceMonitor.enabled would scrape every agent twice: keep one" -}}
{{- end -}}
{{- if not .Values.enabled -}}
{{- fail "\n\nenabled is false, but this chart renders all the same: name `condition: virtbus.enabled` for it in the parent's Chart.yaml" -}}
{{- end -}}
{{- if or (hasPrefix "127." .Values.http.host) (eq "[::1]" .Values.http.host) -}}
{{- fail (printf "\n\nhttp.host = %s is the pod's own loopback: kubelet's probes would not reach it, and every pod be restarted for ever; leave it at [::], or take 0.0.0.0" .Values.http.host) -}}
{{- end -}}
{{- if and .Values.react.enabled .Values.serviceAccount.create (eq (include "virtbus.serviceAccountName" .) (printf "%s-react" (include "virtbus.fullname" .))) -}}
{{- fail (printf "\n\nserviceAccount.name = %s is the account of virtbus react: choose another one" .Values.serviceAccount.name) -}}
{{- end -}}
{{- $sockets := printf "%s/" (clean .Values.libvirt.socketDir) -}}
{{- $spool := printf "%s/" (clean .Values.spool.hostPath) -}}
{{- if eq .Values.spool.type "hostPath" -}}
{{- if hasPrefix $sockets $spool -}}
{{- fail "\n\nspool.hostPath lies in libvirt.socketDir, which is mounted read-only: choose another folder" -}}
{{- end -}}
{{- if or (hasPrefix $spool $sockets) (regexMatch "^/(bin|boot|dev|etc|home|lib|lib64|media|mnt|opt|proc|root|run|sbin|srv|sys|tmp|usr|var)?/?(lib/|run/|log/|spool/|cache/|tmp/)?$" $spool) -}}
{{- fail (printf "\n\nspool.hostPath = %s is a folder of the host's own, and would be given to runAsUser: choose one for this release alone, e.g. /var/lib/virtbus" .Values.spool.hostPath) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.kubevirt.withLibvirt (not .Values.kubevirt.enabled) -}}
{{- fail "\n\nkubevirt.withLibvirt is set, but kubevirt.enabled is not: the host's libvirt is observed without it" -}}
{{- end -}}
{{- if and .Values.kubevirt.enabled (dig "libvirt" "discover" dict .Values.config) -}}
{{- fail "\n\nconfig.libvirt.discover belongs to kubevirt.enabled: keep one" -}}
{{- end -}}
{{- if and .Values.react.enabled (not .Values.react.with) -}}
{{- fail "\n\nreact.enabled is set, but react.with names no integration, e.g. --set react.with=kubernetes" -}}
{{- end -}}
{{- if and .Values.react.image (not .Values.react.image.repository) -}}
{{- fail "\n\nreact.image has no repository: name one, or leave react.image empty" -}}
{{- end -}}
{{- if and (eq .Values.spool.type "emptyDir") (hasKey .Values.spool "hostPath") (ne .Values.spool.hostPath "/var/lib/virtbus") -}}
{{- fail "\n\nspool.hostPath is set, but spool.type is emptyDir: keep one" -}}
{{- end -}}
{{- end -}}
