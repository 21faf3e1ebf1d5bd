"""One model behind OpenAI's interfaces: `scale-rae serve` (docs/serve.md).

settings   what the server is told
schema     requests and answers as they are on the wire
engine     the queue, and the threads that draw and answer what waits together
app        HTTP: routes, limits, errors
server     sockets and signals
"""
