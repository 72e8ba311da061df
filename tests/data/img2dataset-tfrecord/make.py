"""Make the shards beside this file with img2dataset's own tfrecord writer; see README.md for the environment."""

import http.server
import io
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from img2dataset import download
from PIL import Image

MISSING = 9  # the row whose URL answers 404


def picture(number: int) -> bytes:
    ramp = np.linspace(0, 200, 20, dtype=np.uint8)
    across, down = np.tile(ramp, (20, 1)), np.tile(ramp[:, None], (1, 20))
    image = np.stack([across, down, np.full((20, 20), number * 20)], 2).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        number = int(self.path.strip("/").removesuffix(".png"))
        self.send_response(404 if number == MISSING else 200)
        self.end_headers()
        if number != MISSING:
            self.wfile.write(picture(number))

    def log_message(self, *_: object) -> None:
        pass


def table(base: str) -> pa.Table:
    """12 rows; the first shard of four has every value, the others lack some in columns of every type."""
    return pa.table(
        {
            "url": [f"{base}/{i}.png" for i in range(12)],
            "caption": [None if i == 5 else f"picture number {i}, “quoted” é 猫" for i in range(12)],
            "stars": pa.array([None if i in (6, 11) else i - 3 for i in range(12)], pa.int64()),
            "similarity": pa.array([i / 16 for i in range(12)], pa.float32()),
            "score": pa.array([None if i == 4 else i / 8 for i in range(12)], pa.float64()),
            "licence": [None if i % 3 == 0 else "CC-BY" for i in range(12)],
            "seen": [i % 2 == 0 for i in range(12)],
            "tags": [["one", "two"][: 1 + i % 2] for i in range(12)],
            "sizes": pa.array([None if i == 7 else [i, -i, 0] for i in range(12)], pa.list_(pa.int64())),
            "weights": pa.array([[i / 2, 0.25] for i in range(12)], pa.list_(pa.float64())),
        }
    )


if __name__ == "__main__":
    out, work = Path(sys.argv[1]), Path(sys.argv[2])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pairs = table(f"http://127.0.0.1:{server.server_port}")
    pq.write_table(pairs, work / "urls.parquet")
    download(
        url_list=str(work / "urls.parquet"),
        input_format="parquet",
        url_col="url",
        caption_col="caption",
        output_format="tfrecord",
        output_folder=str(out),
        image_size=16,
        resize_mode="keep_ratio",
        number_sample_per_shard=4,
        processes_count=1,
        thread_count=4,
        compute_hash="sha256",
        save_additional_columns=[name for name in pairs.column_names if name not in ("url", "caption")],
        enable_wandb=False,
    )
    server.shutdown()
