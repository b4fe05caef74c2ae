#!/bin/sh
# Nomad: mark the client ineligible for new allocations; running ones stay (no drain, no -force).
set -eu
event=$(cat)
[ "$VIRTBUS_EVENT_TYPE" = io.virtbus.domain.io_error.v1 ] || exit 0
name=$(printf '%s' "$event" | jq -r '.data.host.name | split(".")[0]')
node=$(nomad node status -json | jq -r --arg name "$name" '.[] | select(.Name == $name) | .ID')
[ -n "$node" ] || exit 65 # no client of Nomad: never again
exec nomad node eligibility -disable "$node"
