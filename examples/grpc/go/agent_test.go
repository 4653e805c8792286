// A gRPC service of a guest, the health service, and the host's client.
package agent

import (
	"bufio"
	"context"
	"fmt"
	"log"
	"net"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/mdlayher/vsock"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	pb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

func serve() {
	listener, err := vsock.Listen(5000, nil)
	if err != nil {
		log.Fatal(err)
	}
	server := grpc.NewServer()
	service := health.NewServer()
	service.SetServingStatus("agent", pb.HealthCheckResponse_SERVING)
	pb.RegisterHealthServer(server, service)
	fmt.Println("ready")
	log.Fatal(server.Serve(listener))
}

// The test binary is the agent as well, where AGENT is set.
func TestMain(m *testing.M) {
	if os.Getenv("AGENT") != "" {
		serve()
	}
	agent := exec.Command("vsock", "run", "--cid", "3", "--", os.Args[0])
	agent.Env = append(os.Environ(), "AGENT=1")
	agent.Stderr = os.Stderr
	output, err := agent.StdoutPipe()
	if err != nil {
		log.Fatal(err)
	}
	if err := agent.Start(); err != nil {
		log.Fatal(err)
	}
	if line, err := bufio.NewReader(output).ReadString('\n'); line != "ready\n" {
		log.Fatal("the agent did not start: ", line, err)
	}
	status := m.Run()
	agent.Process.Kill() // go test waits for all that has its output
	agent.Wait()
	os.Exit(status)
}

func dial(t *testing.T) (pb.HealthClient, context.Context) {
	connect := func(context.Context, string) (net.Conn, error) { return vsock.Dial(3, 5000, nil) }
	connection, err := grpc.Dial("agent", grpc.WithInsecure(), grpc.WithContextDialer(connect))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(func() {
		cancel()
		connection.Close()
	})
	return pb.NewHealthClient(connection), ctx
}

func TestManyCallsAtOnce(t *testing.T) {
	const calls = 500
	client, ctx := dial(t)
	failures := make(chan error, calls)
	for i := 0; i < calls; i++ {
		go func() {
			_, err := client.Check(ctx, &pb.HealthCheckRequest{Service: "agent"})
			failures <- err
		}()
	}
	for i := 0; i < calls; i++ {
		if err := <-failures; err != nil {
			t.Fatal(err)
		}
	}
}

func TestSuspendedMachineEndsItsCalls(t *testing.T) {
	client, ctx := dial(t)
	watch, err := client.Watch(ctx, &pb.HealthCheckRequest{Service: "agent"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := watch.Recv(); err != nil {
		t.Fatal(err)
	}
	for _, change := range []string{"suspend", "resume"} {
		if output, err := exec.Command("vsock", "context", change, "3").CombinedOutput(); err != nil {
			t.Fatal(string(output), err)
		}
	}
	if _, err := watch.Recv(); status.Code(err) != codes.Unavailable {
		t.Fatal(err)
	}
	if _, err := client.Check(ctx, &pb.HealthCheckRequest{}, grpc.WaitForReady(true)); err != nil {
		t.Fatal(err)
	}
}
