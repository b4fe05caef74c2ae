//go:build tools

// Package apiserver pins the control plane that the chart is tried on; see ../apiserver.py.
package apiserver

import (
	_ "k8s.io/kubernetes/cmd/kube-apiserver/app"
	_ "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	_ "k8s.io/kubernetes/cmd/kube-scheduler/app"
)
