"""The HTTP server with OpenAI's interfaces: `scale-rae serve` (docs/serve.md).

settings     the server's settings and limits
refusals     the error for refused requests; errors: from any exception to an answer
schema       requests and answers of the HTTP interface
jobs         a request's work, and its result
turns        the order of clients; schedule: the queue, and the choice of the next batch
engine       the threads that own the model, and the stages of a job
data_urls    data URLs -> images; decoding: the same in processes that can be killed
guard        checks of hosts, keys and bodies
connections  HTTP/1.1, with limits on connections and on time
streaming    waiting for a job, and server-sent events
routes       the endpoints, one file each
app          all endpoints put together
server       sockets and signals
"""
