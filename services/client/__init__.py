"""The Python client of antiphon.v1, sync and async.

    with Client("127.0.0.1:9000") as client:
        session = client.create_session()
        for event in session.chat("Where is Cremona?"):
            if isinstance(event, Delta):
                print(event.text, end="", flush=True)

Every method raises the typed errors of services.common.errors. A turn that fails with Unavailable before its first
event is tried again, but only under an idempotency key (Session.chat makes one), so it never runs twice.
"""

from services.client.aio import AsyncClient, AsyncSession
from services.client.calls import ClientTls, Input
from services.client.sync import Client, Session
from services.common.messages import Delta, Finished, Message, Started
from services.common.sampling import SamplingParams

__all__ = [
    "AsyncClient",
    "AsyncSession",
    "Client",
    "ClientTls",
    "Delta",
    "Finished",
    "Input",
    "Message",
    "SamplingParams",
    "Session",
    "Started",
]
