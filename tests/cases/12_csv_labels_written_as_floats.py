"""With CSV labels "0.0", "1.0" (pandas writes them after a column had a missing value), every task is refused as
wrong_dtype, while the same numbers in .jsonl and .parquet are accepted. "1_5" in a CSV, which no other reader accepts
as a number, is read as 15."""
import sys, json, tempfile, pathlib
from streams.sources import samples
from streams.spec import Limits, TaskSpec
from streams.formats import wire
spec, d = TaskSpec((2,), ways=3), pathlib.Path(tempfile.mkdtemp())
def read(name, text):
    (d / name).write_text(text)
    for a in samples.create_source(samples.Settings(path=str(d / name), x=("a", "b"), y=("y",), count=2, grows=False), spec, "s", 0).read(None):
        if a.rejection: return f"refused: {a.rejection}"
        t = wire.decode(a.body, spec, Limits()); return t.support.x.tolist(), t.support.y.tolist()
rows = [dict(a=1.0, b=2.0, y=0.0), dict(a=3.0, b=4.0, y=1.0)]
as_json = read("r.jsonl", "".join(json.dumps(r) + "\n" for r in rows)); as_csv = read("r.csv", "a,b,y\n" + "".join(f"{r['a']},{r['b']},{r['y']}\n" for r in rows))
under = read("u.csv", "a,b,y\n1_5,2,0\n3,4,1\n")
print("json:", as_json, "\ncsv: ", as_csv, "\n1_5: ", under); faults = []
if as_csv != as_json: faults.append("labels written as 0.0 are refused in .csv and accepted in .jsonl")
if "refused" not in str(under): faults.append("1_5 is silently read as 15")
sys.exit(f"FAULT: {faults}" if faults else 0)
