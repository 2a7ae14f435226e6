"""A process that reads every n-th batch of a run, and writes them to its parent: see `moe.data.readers`.

    python3 -m moe.data.reader    # a job as one line of JSON on stdin, batches on stdout

It ends when its stdin does, so that it outlives its parent by no more than an instant, however that
died. Everything heavy is imported after that is set up.
"""

import json
import os
import struct
import sys
import threading
from typing import Any

LENGTH = struct.Struct("<Q")  # bytes of the JSON that follows; then come the arrays it describes


def main() -> None:
    """Reads the job, then serves batches until somebody ends it."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints would stand between the batches
    job = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _serve(job, out)
    except BrokenPipeError:
        os._exit(0)  # the parent closed its end


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(0)


def _serve(job: dict[str, Any], out: Any) -> None:
    from moe.config import ConfigDict
    from moe.data.open import make_data
    from moe.data.tokenizers import from_json
    from moe.errors import UserError

    try:
        section, tokenizer = ConfigDict(job["section"]), from_json(job["tokenizer"])
        data = make_data(section, tokenizer=tokenizer, **job["options"])
        found = {"fingerprint": data.fingerprint, "code": data.code}
        if found != job["same"]:
            raise UserError(f"it finds {found}, and the run {job['same']}: they changed meanwhile")
        row, batches = job["row"], data.read(*job["read"])
        for batch in batches:
            arrays = {name: value for name, value in batch._asdict().items() if value is not None}
            shapes = [[name, value.dtype.str, value.shape] for name, value in arrays.items()]
            _send(
                out, {"row": row, "arrays": shapes}, [value.tobytes() for value in arrays.values()]
            )
            row += job["rows"]
    except UserError as error:
        _send(out, {"error": str(error)}, [])


def _send(out: Any, head: dict[str, Any], parts: list[bytes]) -> None:
    text = json.dumps(head).encode()
    out.write(LENGTH.pack(len(text)) + text)
    for part in parts:
        out.write(part)
    out.flush()


if __name__ == "__main__":
    main()
