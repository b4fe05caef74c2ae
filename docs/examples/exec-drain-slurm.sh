#!/bin/sh
# Slurm: take no new jobs on a host whose guest was stopped by an I/O error.
#   [react.exec]
#   command = ["/usr/local/bin/exec-drain-slurm.sh"]
# The event is on standard input. Exit 0: done; 65: never again; anything else: once more later.
set -eu
event=$(cat)
case $VIRTBUS_EVENT_TYPE in
io.virtbus.domain.io_error.v1) ;;
*) exit 0 ;;
esac
node=$(printf '%s' "$event" | jq -r '.data.host.name | split(".")[0]')
action=$(printf '%s' "$event" | jq -r '.data.error.action')
[ "$action" = pause ] || exit 0
exec scontrol update "nodename=$node" state=drain "reason=virtbus: I/O error $VIRTBUS_EVENT_ID"
