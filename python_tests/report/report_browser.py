"""A headless Chromium under the tests' control, by its own protocol over two pipes: nothing but the browser is needed.

`--remote-debugging-pipe` has Chromium read commands from file descriptor 3 and write answers to 4: JSON, each ended by
a zero byte (https://chromedevtools.github.io/devtools-protocol).
"""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import time

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_PATIENCE = 90  # seconds, for a machine with much else to do
KEYS = {
    "ArrowRight": 39,
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowDown": 40,
    "Home": 36,
    "End": 35,
    "Enter": 13,
    "Escape": 27,
    "Tab": 9,
}


class Chromium:
    """A browser with one page.

    Args:
        folder: for its profile.
    """

    def __init__(self, folder):
        self._number = 0
        self._rest = b""
        self.session = None
        self.problems = []
        command, self._write = self._pipe(reading=0)
        answers, self._read = self._pipe(reading=1)
        options = [
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-extensions", "--mute-audio"),
            *("--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"),
        ]
        quiet = os.open(os.devnull, os.O_RDWR)
        self.process = os.posix_spawn(
            CHROMIUM,
            [CHROMIUM, *options],
            {**os.environ, "HOME": str(folder), "LC_ALL": "C.UTF-8"},
            setsid=True,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, quiet, 0),
                (os.POSIX_SPAWN_DUP2, quiet, 1),
                (os.POSIX_SPAWN_DUP2, quiet, 2),
                (os.POSIX_SPAWN_DUP2, command, 3),
                (os.POSIX_SPAWN_DUP2, answers, 4),
            ],
        )
        for handle in (quiet, command, answers):
            os.close(handle)
        try:
            target = self.send("Target.createTarget", url="about:blank")["targetId"]
            self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.send(f"{domain}.enable")
        except BaseException:  # nobody has it, to close it
            os.killpg(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
            raise

    @staticmethod
    def _pipe(*, reading):
        """Ends of a pipe, the child's first, both beyond the numbers that the child's ends will get."""
        ends = os.pipe()
        moved = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20) for end in ends]
        for end in ends:
            os.close(end)
        return moved if reading == 0 else moved[::-1]

    def send(self, method, **parameters):
        """Do something and return what comes of it; meanwhile collect what the page complains of."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _receive(self):
        deadline = time.monotonic() + _PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the browser does not answer"
            piece = os.read(self._read, 1 << 20)
            assert piece, "the browser has ended"
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(line)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, event, parameters):
        if event == "Runtime.exceptionThrown":
            self.problems.append(parameters["exceptionDetails"])
        elif event == "Runtime.consoleAPICalled":
            self.problems.append([one.get("value") for one in parameters["args"]])
        elif event == "Log.entryAdded":
            self.problems.append(parameters["entry"]["text"])
        elif event == "Network.requestWillBeSent" and not parameters["request"]["url"].startswith(("data:", "file:")):
            self.problems.append(f"asked for {parameters['request']['url']}")

    def open(self, path, *, width=1280, height=900, dark=False, still=False):
        """Load a file, and wait until it is complete."""
        self.problems.clear()
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.prefer(dark=dark, still=still)
        self.send("Page.navigate", url=path.as_uri())
        deadline = time.monotonic() + _PATIENCE
        while not self.run(f"document.readyState === 'complete' && location.href.startsWith({path.as_uri()!r})"):
            assert time.monotonic() < deadline, "the page does not load"
            time.sleep(0.02)

    def prefer(self, *, dark=False, still=False):
        """What the reader's system asks of pages."""
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce" if still else "no-preference"},
        ]
        self.send("Emulation.setEmulatedMedia", media="", features=features)

    def run(self, script):
        """The value of an expression in the page."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def text(self, selector):
        return self.run(f"document.querySelector({selector!r}).textContent.replace(/\\s+/g, ' ').trim()")

    def count(self, selector):
        """How many elements there are that are shown."""
        return self.run(f"[...document.querySelectorAll({selector!r})].filter((e) => e.checkVisibility()).length")

    def place(self, selector):
        """The middle of an element that is brought into view, once what comes into view with it has been laid out."""
        box = self.run(
            f"""(async () => {{
              const element = document.querySelector({selector!r});
              const frame = () => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
              let box = null;
              for (let quiet = 0; quiet < 3; ) {{
                element.scrollIntoView({{ block: "center", behavior: "instant" }});
                await frame();
                const now = element.getBoundingClientRect();
                quiet = box && box.left === now.left && box.top === now.top ? quiet + 1 : 0;
                box = now;
              }}
              return [box.left, box.top, box.width, box.height];
            }})()"""
        )
        return box[0] + box[2] / 2, box[1] + box[3] / 2, box

    def click(self, selector):
        x, y, _ = self.place(selector)
        self.mouse("mousePressed", x, y)
        self.mouse("mouseReleased", x, y)

    def mouse(self, kind, x, y):
        button = "none" if kind == "mouseMoved" else "left"
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, clickCount=int(button == "left"))

    def key(self, name):
        code = KEYS.get(name, ord(name.upper()) if len(name) == 1 else 0)
        text = {"Enter": "\r"}.get(name, name if len(name) == 1 else "")
        for kind in ("keyDown", "keyUp"):
            parameters = {"type": kind, "key": name, "windowsVirtualKeyCode": code}
            if kind == "keyDown" and text:
                parameters["text"] = text
            self.send("Input.dispatchKeyEvent", **parameters)

    def choose(self, selector, value):
        """Set a control, and have the page told as if a reader had."""
        self.run(
            f"(() => {{ const e = document.querySelector({selector!r}); e.value = {value!r}; "
            "e.dispatchEvent(new Event('input', {bubbles: true})); })()"
        )

    def picture(self, path, *, whole=False):
        """Write a screenshot (PNG)."""
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self):
        with contextlib.suppress(AssertionError, OSError):
            self.session = None
            self.send("Browser.close")
        deadline = time.monotonic() + 10
        while os.waitpid(self.process, os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                os.killpg(self.process, signal.SIGKILL)
                os.waitpid(self.process, 0)
                break
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGKILL)  # helpers that outlive it
        os.close(self._read)
        os.close(self._write)
