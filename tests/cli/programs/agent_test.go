// A suite of `go test` for `vsock fabric -- go test`: a service on the host, its client in a guest.
package agent

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"unsafe"
)

const family, anyCID, host, port = 40, 0xFFFFFFFF, 2, 5000

// struct sockaddr_vm
type address struct {
	family, reserved uint16
	port, cid        uint32
	zero             [4]uint8
}

func call(number uintptr, fd int, at *address) error {
	_, _, code := syscall.Syscall(number, uintptr(fd), uintptr(unsafe.Pointer(at)), 16)
	if code != 0 {
		return code
	}
	return nil
}

func open(t *testing.T) int {
	fd, err := syscall.Socket(family, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

// TestAgent is the guest's half, which TestServed starts.
func TestAgent(t *testing.T) {
	if os.Getenv("AGENT") == "" {
		t.Skip("started by TestServed")
	}
	fd := open(t)
	if err := call(syscall.SYS_CONNECT, fd, &address{family: family, port: port, cid: host}); err != nil {
		t.Fatal(err)
	}
	syscall.Write(fd, []byte("ready"))
}

func TestServed(t *testing.T) {
	fd := open(t)
	if err := call(syscall.SYS_BIND, fd, &address{family: family, port: port, cid: anyCID}); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Listen(fd, 1); err != nil {
		t.Fatal(err)
	}
	vsock := append(strings.Fields(os.Getenv("VSOCK")), "run", "--cid", "3", "--")
	words := append(vsock, os.Args[0], "-test.run=TestAgent", "-test.v")
	agent := exec.Command(words[0], words[1:]...)
	agent.Env = append(os.Environ(), "AGENT=1")
	agent.Stdout, agent.Stderr = os.Stdout, os.Stderr
	if err := agent.Start(); err != nil {
		t.Fatal(err)
	}
	var from address
	size := uint32(unsafe.Sizeof(from))
	accepted, _, code := syscall.Syscall(syscall.SYS_ACCEPT, uintptr(fd), uintptr(unsafe.Pointer(&from)), uintptr(unsafe.Pointer(&size)))
	if code != 0 {
		t.Fatal(code)
	}
	data := make([]byte, 16)
	count, err := syscall.Read(int(accepted), data)
	if err != nil || from.cid != 3 || string(data[:count]) != "ready" {
		t.Fatal(err, from.cid, string(data[:count]))
	}
	if err := agent.Wait(); err != nil {
		t.Fatal(err)
	}
}

func TestDenied(t *testing.T) {
	if os.Getenv("FAIL") == "" {
		t.Skip("not asked to fail")
	}
	err := call(syscall.SYS_CONNECT, open(t), &address{family: family, port: port, cid: 99})
	if errors.Is(err, syscall.EHOSTUNREACH) || errors.Is(err, syscall.ENODEV) {
		t.Fatal(fmt.Sprint("cannot connect: ", err))
	}
}
