module example.org/agent

go 1.19

require (
	github.com/mdlayher/vsock v1.2.0
	google.golang.org/grpc v1.33.3
)
