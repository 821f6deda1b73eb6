"""Where the answers of one teacher come from: a teacher job, a folder of answers, or both."""

from __future__ import annotations

from vcrd.cache.answers import CachedAnswers
from vcrd.link.handshake import Tokenizer
from vcrd.link.rendezvous import Rendezvous, host_rendezvous
from vcrd.link.student import StudentLink
from vcrd.megatron.layout import Layout
from vcrd.settings import LinkSettings, TeacherSource


def host_source(settings: LinkSettings, source: TeacherSource) -> Rendezvous | None:
    """Opens the rendezvous of a teacher job, on rank 0 of the student job; None for a source without an address."""
    return None if source.address is None else host_rendezvous(settings.of(source))


def open_source(
    settings: LinkSettings, source: TeacherSource, layout: Layout, tokenizer: Tokenizer | None
) -> StudentLink | CachedAnswers:
    """Opens this rank's end of one teacher; blocks until its job has joined. Every rank of the last stage calls it.

    settings: of the job, with the payloads and limits of all teachers. tokenizer: the student's. Errors and collectives
    as of `StudentLink.connect` and `CachedAnswers.connect`.
    """
    own, place = settings.of(source), layout.place(tokenizer)
    if source.cache is None:
        return StudentLink.connect(own, **place, called=source.name)
    return CachedAnswers.connect(own, source, group=layout.groups.tensor_context, **place)
