import socket
import subprocess
import sys

import pytest

CONNECT = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)"  # an address for documentation


def test_this_process_connects_to_this_machine_only():
    with socket.socket() as client:
        client.settimeout(1)
        for connect in (client.connect, client.connect_ex):
            with pytest.raises(AssertionError, match=r"a test tried to connect to 192\.0\.2\.1"):
                connect(("192.0.2.1", 80))
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()


def test_child_process_cannot_connect_to_other_machines(lab):
    environment = lab.environment()
    done = subprocess.run([sys.executable, "-c", CONNECT], env=environment, capture_output=True, text=True, check=False)
    assert "a test tried to connect to 192.0.2.1" in done.stderr
