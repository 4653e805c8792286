// An echo service and its clients in Go: no C library, raw system calls, a runtime that
// preempts its threads with signals, and sockets in its network poller.
//
//	echo serve N        prints its port, serves N connections
//	echo call CID PORT N    N connections at the same time, half of them blocking a thread
package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"
	"unsafe"
)

const (
	family  = 40
	anyCID  = 0xFFFFFFFF
	anyPort = 0xFFFFFFFF
	size    = 300_000
)

// struct sockaddr_vm
type address struct {
	family, reserved uint16
	port, cid        uint32
	flags            uint8
	zero             [3]uint8
}

func check(doing string, err error) {
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", doing, err)
		os.Exit(1)
	}
}

func open(kind int) int {
	fd, err := syscall.Socket(family, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC|kind, 0)
	check("socket", err)
	return fd
}

// Without telling the scheduler, as packages for vSockets do where nothing waits.
func raw(number uintptr, fd int, second, third uintptr) error {
	if _, _, code := syscall.RawSyscall(number, uintptr(fd), second, third); code != 0 {
		return code
	}
	return nil
}

func tryName(number uintptr, fd int) (address, error) {
	var found address
	room := uint32(unsafe.Sizeof(found))
	err := raw(number, fd, uintptr(unsafe.Pointer(&found)), uintptr(unsafe.Pointer(&room)))
	return found, err
}

func name(number uintptr, fd int) address {
	found, err := tryName(number, fd)
	check("name", err)
	return found
}

func serve(count int) {
	fd := open(syscall.SOCK_NONBLOCK)
	where := address{family: family, cid: anyCID, port: anyPort}
	check("bind", raw(syscall.SYS_BIND, fd, uintptr(unsafe.Pointer(&where)), unsafe.Sizeof(where)))
	check("listen", syscall.Listen(fd, count))
	fmt.Println(name(syscall.SYS_GETSOCKNAME, fd).port)
	listener := os.NewFile(uintptr(fd), "listener")
	waiting, err := listener.SyscallConn()
	check("listener", err)
	var serving sync.WaitGroup
	for i := 0; i < count; i++ {
		var accepted uintptr
		var code syscall.Errno
		err := waiting.Read(func(fd uintptr) bool {
			accepted, _, code = syscall.Syscall6(syscall.SYS_ACCEPT4, fd, 0, 0,
				syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC, 0, 0)
			return code != syscall.EAGAIN
		})
		check("accept", err)
		if code != 0 {
			check("accept4", code)
		}
		serving.Add(1)
		go func() {
			defer serving.Done()
			connection := os.NewFile(accepted, "connection")
			defer connection.Close()
			_, err := io.Copy(connection, connection)
			check("echo", err)
		}()
	}
	serving.Wait()
}

func connect(peer address, blocking bool) *os.File {
	kind := syscall.SOCK_NONBLOCK
	if blocking {
		kind = 0
	}
	fd := open(kind)
	at, length := uintptr(unsafe.Pointer(&peer)), unsafe.Sizeof(peer)
	if blocking {
		_, _, code := syscall.Syscall(syscall.SYS_CONNECT, uintptr(fd), at, length)
		if code != 0 {
			check("connect", code)
		}
		check("nonblock", syscall.SetNonblock(fd, true))
		return os.NewFile(uintptr(fd), "connection")
	}
	connection := os.NewFile(uintptr(fd), "connection")
	waiting, err := connection.SyscallConn()
	check("connection", err)
	begun := false
	check("connecting", waiting.Write(func(uintptr) bool {
		if !begun {
			begun = true
			if err := raw(syscall.SYS_CONNECT, fd, at, length); err != syscall.EINPROGRESS {
				check("non-blocking connect", err)
			}
			return false
		}
		code, err := syscall.GetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_ERROR)
		check("SO_ERROR", err)
		if code != 0 {
			check("connecting", syscall.Errno(code))
		}
		_, err = tryName(syscall.SYS_GETPEERNAME, fd)
		return err == nil // else it was woken for what was before
	}))
	return connection
}

func call(peer address, blocking bool) {
	connection := connect(peer, blocking)
	defer connection.Close()
	waiting, err := connection.SyscallConn()
	check("connection", err)
	check("control", waiting.Control(func(fd uintptr) {
		if found := name(syscall.SYS_GETPEERNAME, int(fd)); found != peer {
			check("getpeername", fmt.Errorf("%v", found))
		}
	}))
	// Nothing has come yet: it is the netpoller that knows of deadlines.
	check("deadline", connection.SetReadDeadline(time.Now().Add(10*time.Millisecond)))
	if _, err := connection.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		check("read", fmt.Errorf("%v, expected a deadline exceeded", err))
	}
	check("deadline", connection.SetReadDeadline(time.Time{}))
	sent, came := bytes.Repeat([]byte("vsock"), size/5), make([]byte, size)
	go func() {
		_, err := connection.Write(sent)
		check("write", err)
	}()
	_, err = io.ReadFull(connection, came)
	check("read", err)
	if !bytes.Equal(sent, came) {
		check("echo", errors.New("not what was sent"))
	}
}

func number(text string) uint32 {
	value, err := strconv.ParseUint(text, 10, 32)
	check("number", err)
	return uint32(value)
}

func main() {
	if os.Args[1] == "serve" {
		serve(int(number(os.Args[2])))
		return
	}
	peer := address{family: family, cid: number(os.Args[2]), port: number(os.Args[3])}
	var calling sync.WaitGroup
	for i := 0; i < int(number(os.Args[4])); i++ {
		blocking := i%2 == 0
		calling.Add(1)
		go func() {
			defer calling.Done()
			call(peer, blocking)
		}()
	}
	calling.Wait()
	fmt.Println("echoed")
}
