"""A chat client for Python with the websockets package: CHATD_TOKEN=… python3 chat.py URL ROOM

Lines typed are said; what is said is printed, once, also after a lost connection.
"""
import asyncio
import itertools
import json
import os
import sys

import websockets

url, room = sys.argv[1:]
headers = "additional_headers" if int(websockets.__version__.split(".")[0]) >= 14 else "extra_headers"
waiting = {}  # by cid: said, and not yet known to be on the server's disk
online = None


async def listen():
    global online
    cursor = None
    async for socket in websockets.connect(
            "ws" + url.removeprefix("http") + "/ws", subprotocols=["chatd.v1"],
            **{headers: {"Authorization": "Bearer " + os.environ["CHATD_TOKEN"]}}):
        try:
            await socket.send(json.dumps({"type": "hello"} | ({} if cursor is None else {"since": cursor})))
            async for text in socket:
                frame = json.loads(text)
                if frame["type"] in ("message", "edit", "delete", "react", "caught_up"):
                    cursor = frame["id"]
                waiting.pop(frame.get("cid"), None)
                if frame["type"] == "message" and frame["room"] == room:
                    print(f"{frame['username']}: {frame['message']}", flush=True)
                if frame["type"] == "error":
                    print(frame["error"], file=sys.stderr)
                if frame["type"] == "caught_up":
                    print("connected", file=sys.stderr, flush=True)
                    online = socket
                    for said in list(waiting.values()):
                        await socket.send(json.dumps(said))
        except websockets.ConnectionClosed:
            online = None


async def speak():
    for n in itertools.count():
        line = await asyncio.to_thread(sys.stdin.readline)
        if not line:
            return
        frame = {"type": "message", "room": room, "message": line.rstrip("\n"), "cid": f"{os.urandom(8).hex()}-{n}"}
        waiting[frame["cid"]] = frame
        try:
            if online:
                await online.send(json.dumps(frame))
        except websockets.ConnectionClosed:
            pass  # it goes out when there is a new one


async def main():
    await asyncio.gather(listen(), speak())


asyncio.run(main())
