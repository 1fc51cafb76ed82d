"""The client's tests run against real servers, as those of the server do."""

from tests.server.conftest import server as server
from tests.server.conftest import weights as weights
