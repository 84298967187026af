"""A Redis stream is trimmed (MAXLEN) past the reader's position. docs/how-to/sources.md promises an error in the log for
entries that the broker deletes before they are read, and Kafka and NATS log it. With Redis, four entries are lost and
nothing is logged. (XINFO STREAM has max-deleted-entry-id and entries-added since Redis 7.) Needs redis-server on the
PATH."""
import io, logging, random, subprocess, sys, tempfile, time, redis
text = io.StringIO(); logging.basicConfig(stream=text, level=logging.INFO)
from streams.sources import redis as source
from streams.spec import TaskSpec
port = random.randrange(21000, 29999)
server = subprocess.Popen(["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--dir", tempfile.mkdtemp(), "--save", ""], stdout=subprocess.DEVNULL)
try:
    client = redis.Redis(port=port)
    while True:
        try: client.ping(); break
        except redis.ConnectionError: time.sleep(.1)
    def take(after, most):
        s = source.create_source(source.Settings(url=f"redis://127.0.0.1:{port}/0", stream="tasks", group="g"), TaskSpec((2,), ways=3), "broker", 0); out = []
        for a in s.read(after):
            if a is None: break
            s.ack([a]); out.append(a)
            if len(out) == most: break
        return out
    for i in range(10): client.xadd("tasks", {"id": f"t{i}", "body": b"x"})
    first = take(None, 3); client.xtrim("tasks", maxlen=3, approximate=False); rest = take(first[-1].cursor, 10)
    got = [a.id for a in (*first, *rest)]; lost = sorted({f"t{i}" for i in range(10)} - set(got))
    print("read:", got, "lost:", lost, "log:", repr(text.getvalue()))
    sys.exit(f"FAULT: {lost} were deleted before they were read and nothing is logged" if lost and "ERROR" not in text.getvalue() else 0)
finally: server.terminate()
