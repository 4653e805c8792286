package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/mdlayher/vsock"
)

// The test binary is the agent as well, where AGENT is set.
func TestMain(m *testing.M) {
	if os.Getenv("AGENT") != "" {
		main()
	}
	os.Exit(m.Run())
}

// startAgent starts the agent in guest 3 and returns when it listens.
func startAgent(t *testing.T) {
	t.Helper()
	agent := exec.Command("vsock", "run", "--cid", "3", "--", os.Args[0])
	agent.Env = append(os.Environ(), "AGENT=1")
	agent.Stderr = os.Stderr
	output, err := agent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := agent.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		agent.Process.Kill()
		agent.Wait()
	})
	if line, err := bufio.NewReader(output).ReadString('\n'); line != "ready\n" {
		t.Fatal("the agent did not start: ", line, err)
	}
}

func connect(t *testing.T) *vsock.Conn {
	t.Helper()
	connection, err := vsock.Dial(3, 5000, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { connection.Close() })
	connection.SetDeadline(time.Now().Add(20 * time.Second))
	return connection
}

func ask(connection *vsock.Conn, request string) (string, error) {
	if _, err := fmt.Fprintln(connection, request); err != nil {
		return "", err
	}
	return bufio.NewReader(connection).ReadString('\n')
}

func TestReplies(t *testing.T) {
	startAgent(t)
	connection := connect(t)
	for request, expected := range map[string]string{
		"ping":    "pong from context 3\n",
		"add 2 3": "5\n",
		"dance":   "unknown request\n",
	} {
		if reply, err := ask(connection, request); reply != expected {
			t.Errorf("%s: %q, %v (expected %q)", request, reply, err, expected)
		}
	}
}

func TestPortWithoutListenerResets(t *testing.T) {
	startAgent(t)
	if _, err := vsock.Dial(3, 5001, nil); !errors.Is(err, syscall.ECONNRESET) {
		t.Fatal(err)
	}
}

func TestSuspendedMachineLosesItsConnections(t *testing.T) {
	startAgent(t)
	connection := connect(t)
	if _, err := ask(connection, "ping"); err != nil {
		t.Fatal(err)
	}
	for _, change := range []string{"suspend", "resume"} {
		if output, err := exec.Command("vsock", "context", change, "3").CombinedOutput(); err != nil {
			t.Fatal(string(output), err)
		}
	}
	if reply, err := ask(connection, "ping"); err == nil {
		t.Fatal("the connection goes on: ", reply)
	}
	if reply, err := ask(connect(t), "ping"); err != nil {
		t.Fatal(reply, err)
	}
}
