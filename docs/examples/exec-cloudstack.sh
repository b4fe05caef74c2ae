#!/bin/sh
# CloudStack: disable the host for new placements (not maintenance: that would move its guests).
set -eu
event=$(cat)
[ "$VIRTBUS_EVENT_TYPE" = io.virtbus.domain.io_error.v1 ] || exit 0
name=$(printf '%s' "$event" | jq -r '.data.host.name')
id=$(cmk -o json list hosts "name=$name" | jq -r '.host[0].id // empty')
[ -n "$id" ] || exit 65 # no host of CloudStack: never again
exec cmk update host "id=$id" allocationstate=Disable
