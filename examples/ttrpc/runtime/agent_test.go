// The host's half, as Kata's runtime has it: a ttrpc client on mdlayher/vsock.
package runtime

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	"github.com/mdlayher/vsock"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Messages of Kata's health.proto.
type CheckRequest struct {
	Service string `protobuf:"bytes,1,opt,name=service,proto3"`
}
type HealthCheckResponse struct {
	Status int32 `protobuf:"varint,1,opt,name=status,proto3"`
}
type VersionCheckResponse struct {
	GrpcVersion string `protobuf:"bytes,1,opt,name=grpc_version,proto3"`
}

func (m *CheckRequest) Reset()                 { *m = CheckRequest{} }
func (m *CheckRequest) String() string         { return fmt.Sprintf("%+v", *m) }
func (*CheckRequest) ProtoMessage()            {}
func (m *HealthCheckResponse) Reset()          { *m = HealthCheckResponse{} }
func (m *HealthCheckResponse) String() string  { return fmt.Sprintf("%+v", *m) }
func (*HealthCheckResponse) ProtoMessage()     {}
func (m *VersionCheckResponse) Reset()         { *m = VersionCheckResponse{} }
func (m *VersionCheckResponse) String() string { return fmt.Sprintf("%+v", *m) }
func (*VersionCheckResponse) ProtoMessage()    {}

const serving = 1

func connect(t *testing.T) (*ttrpc.Client, context.Context) {
	connection, err := vsock.Dial(3, 1024, nil)
	if err != nil {
		t.Fatal(err)
	}
	client := ttrpc.NewClient(connection)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(func() {
		cancel()
		client.Close()
	})
	return client, ctx
}

// TestMain starts the agent in guest 3, by cargo, which has compiled it already.
func TestMain(m *testing.M) {
	agent := exec.Command("vsock", "run", "--cid", "3", "--",
		"cargo", "run", "--quiet", "--manifest-path", "../agent/Cargo.toml")
	agent.Stderr = os.Stderr
	output, err := agent.StdoutPipe()
	if err != nil {
		panic(err)
	}
	if err := agent.Start(); err != nil {
		panic(err)
	}
	if line, err := bufio.NewReader(output).ReadString('\n'); line != "ready\n" {
		panic(fmt.Sprint("the agent did not start: ", line, err))
	}
	status := m.Run()
	agent.Process.Kill() // go test waits for all that has its output
	agent.Wait()
	os.Exit(status)
}

func TestHealth(t *testing.T) {
	client, ctx := connect(t)
	reply := HealthCheckResponse{}
	if err := client.Call(ctx, "grpc.Health", "Check", &CheckRequest{}, &reply); err != nil {
		t.Fatal(err)
	}
	if reply.Status != serving {
		t.Fatal(reply.Status)
	}
	version := VersionCheckResponse{}
	if err := client.Call(ctx, "grpc.Health", "Version", &CheckRequest{}, &version); err != nil {
		t.Fatal(err)
	}
	if version.GrpcVersion != "0.0.1" {
		t.Fatal(version.GrpcVersion)
	}
}

func TestUnknownMethod(t *testing.T) {
	client, ctx := connect(t)
	err := client.Call(ctx, "grpc.Health", "Dance", &CheckRequest{}, &HealthCheckResponse{})
	if status.Code(err) != codes.InvalidArgument {
		t.Fatal(err)
	}
}

func TestManyCallsAtOnce(t *testing.T) {
	const calls = 200
	client, ctx := connect(t)
	failures := make(chan error, calls)
	for i := 0; i < calls; i++ {
		go func() {
			request := &CheckRequest{Service: fmt.Sprint(i)}
			failures <- client.Call(ctx, "grpc.Health", "Check", request, &HealthCheckResponse{})
		}()
	}
	for i := 0; i < calls; i++ {
		if err := <-failures; err != nil {
			t.Fatal(err)
		}
	}
}
