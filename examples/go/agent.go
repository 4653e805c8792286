// An agent in a guest: it answers each line with a line, and serves the host alone.
package main

import (
	"bufio"
	"fmt"
	"log"
	"net"
	"strings"

	"github.com/mdlayher/vsock"
)

func main() {
	listener, err := vsock.Listen(5000, nil)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("ready")
	for {
		connection, err := listener.Accept()
		if err != nil {
			log.Fatal(err)
		}
		go serve(connection)
	}
}

func serve(connection net.Conn) {
	defer connection.Close()
	if connection.RemoteAddr().(*vsock.Addr).ContextID != vsock.Host {
		return
	}
	local := connection.LocalAddr().(*vsock.Addr)
	for lines := bufio.NewScanner(connection); lines.Scan(); {
		fmt.Fprintln(connection, answer(lines.Text(), local.ContextID))
	}
}

func answer(line string, cid uint32) string {
	var one, two int
	switch {
	case strings.TrimSpace(line) == "ping":
		return fmt.Sprint("pong from context ", cid)
	case match(line, "add %d %d", &one, &two):
		return fmt.Sprint(one + two)
	}
	return "unknown request"
}

func match(line, format string, into ...any) bool {
	count, _ := fmt.Sscanf(line, format, into...)
	return count == len(into)
}
