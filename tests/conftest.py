import pytest
import torch as th


@pytest.fixture(autouse=True, scope="session")
def single_thread():
    """One thread: small networks are faster so, and results do not depend on the machine's load."""
    th.set_num_threads(1)
