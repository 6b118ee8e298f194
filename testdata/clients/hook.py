"""A receiver of webhooks: WEBHOOK_SECRET=whsec_… python3 hook.py PORT

It answers whoever says ping. A message may come twice, with the same webhook-id.
"""
import base64
import hmac
import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

key = base64.b64decode(os.environ["WEBHOOK_SECRET"].removeprefix("whsec_"))


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        ident, sent = self.headers["webhook-id"], self.headers["webhook-timestamp"]
        mac = base64.b64encode(hmac.digest(key, f"{ident}.{sent}.".encode() + body, "sha256")).decode()
        if not hmac.compare_digest("v1," + mac, self.headers["webhook-signature"]) or abs(time.time() - int(sent)) > 300:
            return self.send_error(401)
        message = json.loads(body)
        answer = {"text": f"pong, {message['username']}"} if "ping" in message["message"] else {}
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())


ThreadingHTTPServer(("localhost", int(sys.argv[1])), Receiver).serve_forever()
