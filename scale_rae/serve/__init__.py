"""One model behind OpenAI's interfaces: `scale-rae serve` (docs/serve.md).

settings     what the server is told
errors       what is refused, and how
schema       requests and answers as they are on the wire
turns        which client is next
engine       the queue, and the threads that draw and answer what waits together
pictures     data URLs -> images; decoding: that in processes which can be ended
guard        who may ask and how much: hosts, keys, bodies
app          routes
connections  HTTP/1.1, with limits on connections and on time
server       sockets and signals
"""
