"""A progress bar as tqdm draws one, colours, a cursor movement, and a title that a log must not set."""

import sys
import time

for done in range(200):
    sys.stderr.write(f"\r{done / 2:5.1f}%|{'#' * (done // 10):<20}| {done}/200")
    sys.stderr.flush()
    time.sleep(0.01)
sys.stderr.write("\r100.0%|####################| 200/200\n")
print("\x1b[32mgreen\x1b[0m plain \x1b[2J\x1b]0;title\x07end", flush=True)
