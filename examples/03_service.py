"""A service whose threads share one model: POST a picture, get a PNG four times as large.

python examples/03_service.py 8000
curl --data-binary @examples/cat.png http://localhost:8000 --output large.png
"""

import io
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

from sanrt import SanrtError, Upscaler

Image.MAX_IMAGE_PIXELS = 2_000_000
upscaler = Upscaler.load(4)  # threads may share it: it takes their pictures one at a time


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        try:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            large = upscaler(Image.open(io.BytesIO(body)).convert("RGB"))
        except (OSError, ValueError, Image.DecompressionBombError, SanrtError) as error:
            return self.send_error(400, str(error).splitlines()[0])
        encoded = io.BytesIO()
        Image.fromarray(large).save(encoded, "PNG")
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.end_headers()
        return self.wfile.write(encoded.getvalue())


with ThreadingHTTPServer(("localhost", int(sys.argv[1])), Handler) as server:
    print(f"listening on port {server.server_port}", flush=True)
    server.serve_forever()
