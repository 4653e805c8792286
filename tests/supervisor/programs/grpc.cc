/* gRPC's library on AF_VSOCK, with a channel created from a connected socket.
 *
 *     grpc serve             prints its port; answers one call with the request, twice
 *     grpc call CID PORT     makes a call, and prints the size of the answer
 */
#include <grpcpp/create_channel_posix.h>
#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/server_posix.h>

#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <sys/socket.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

static const size_t kSize = 1500000;

static void must(bool done, const char *what)
{
    if (!done) {
        fprintf(stderr, "%s failed\n", what);
        exit(1);
    }
}

static void wait_for(grpc::CompletionQueue &queue)
{
    void *tag;
    bool ok = false;
    must(queue.Next(&tag, &ok) && ok, "an operation");
}

static grpc::ByteBuffer buffer_of(const std::string &text)
{
    grpc::Slice slice(text);
    return grpc::ByteBuffer(&slice, 1);
}

static std::string text_of(const grpc::ByteBuffer &buffer)
{
    grpc::Slice slice;
    must(buffer.DumpToSingleSlice(&slice).ok(), "a slice");
    return std::string(reinterpret_cast<const char *>(slice.begin()), slice.size());
}

static int serve()
{
    sockaddr_vm address = {};
    socklen_t size = sizeof address;
    address.svm_family = AF_VSOCK;
    address.svm_cid = VMADDR_CID_ANY;
    address.svm_port = VMADDR_PORT_ANY;
    int listener = socket(AF_VSOCK, SOCK_STREAM, 0);
    must(!bind(listener, reinterpret_cast<sockaddr *>(&address), size) && !listen(listener, 1) &&
             !getsockname(listener, reinterpret_cast<sockaddr *>(&address), &size),
         "listening");
    grpc::AsyncGenericService service;
    grpc::ServerBuilder builder;
    builder.RegisterAsyncGenericService(&service);
    auto queue = builder.AddCompletionQueue();
    auto server = builder.BuildAndStart();
    printf("%u\n", address.svm_port);
    fflush(stdout);
    int fd = accept4(listener, nullptr, nullptr, SOCK_NONBLOCK);
    must(fd >= 0, "accept");
    grpc::AddInsecureChannelFromFd(server.get(), fd);

    grpc::GenericServerContext context;
    grpc::GenericServerAsyncReaderWriter stream(&context);
    grpc::ByteBuffer request;
    service.RequestCall(&context, &stream, queue.get(), queue.get(), nullptr);
    wait_for(*queue);
    stream.Read(&request, nullptr);
    wait_for(*queue);
    std::string text = text_of(request);
    stream.WriteAndFinish(buffer_of(text + text), grpc::WriteOptions(), grpc::Status::OK, nullptr);
    wait_for(*queue);
    printf("%s\n", context.method().c_str());
    server->Shutdown();
    queue->Shutdown();
    return 0;
}

static int call(const char *cid, const char *port)
{
    sockaddr_vm address = {};
    address.svm_family = AF_VSOCK;
    address.svm_cid = strtoul(cid, nullptr, 10);
    address.svm_port = strtoul(port, nullptr, 10);
    int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
    must(!connect(fd, reinterpret_cast<sockaddr *>(&address), sizeof address), "connect");
    must(!fcntl(fd, F_SETFL, O_NONBLOCK), "fcntl");
    grpc::GenericStub stub(grpc::CreateInsecureChannelFromFd("vsock", fd));
    grpc::ClientContext context;
    grpc::CompletionQueue queue;
    grpc::Status status;
    grpc::ByteBuffer answer;
    std::string text(kSize, 'g');
    auto reader = stub.PrepareUnaryCall(&context, "/vsockets/Twice", buffer_of(text), &queue);
    reader->StartCall();
    reader->Finish(&answer, &status, nullptr);
    wait_for(queue);
    must(status.ok(), status.error_message().c_str());
    must(text_of(answer) == text + text, "the comparison");
    printf("%zu\n", text_of(answer).size());
    return 0;
}

int main(int argc, char **argv)
{
    return argc == 2 && !strcmp(argv[1], "serve") ? serve() : call(argv[2], argv[3]);
}
