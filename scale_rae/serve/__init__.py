"""One model behind OpenAI's interfaces: `scale-rae serve` (docs/serve.md).

settings     the server's settings and limits
refusals     what is refused, in OpenAI's shape; errors: what any exception becomes
schema       requests and answers as they are on the wire
jobs         a request's work, and its result
turns        which client is next; schedule: what waits, and which of it makes the next batch
engine       the threads that own the model, and the stages of a job
data_urls    data URLs -> images; decoding: the same in processes that can be killed
guard        who may ask and how much: hosts, keys, bodies
connections  HTTP/1.1, with limits on connections and on time
streaming    waiting for a job, and server-sent events
routes       the endpoints, one file each
app          the endpoints together
server       sockets and signals
"""
