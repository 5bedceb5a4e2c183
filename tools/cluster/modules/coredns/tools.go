//go:build tools

// Package coredns names the cluster's DNS server, so that go.mod and go.sum pin it.
package coredns

import _ "github.com/coredns/coredns"
