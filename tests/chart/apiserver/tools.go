//go:build tools

// Package apiserver pins the API server that the chart is tried on; see ../apiserver.py.
package apiserver

import _ "k8s.io/kubernetes/cmd/kube-apiserver/app"
