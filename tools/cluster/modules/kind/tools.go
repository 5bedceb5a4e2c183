//go:build tools

// Package kind names kind, so that go.mod and go.sum pin it.
package kind

import _ "sigs.k8s.io/kind"
