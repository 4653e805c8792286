module example.org/runtime

go 1.19

require (
	github.com/containerd/ttrpc v1.1.1
	github.com/mdlayher/vsock v1.2.0
)
