"""What to do when most rows of a table fail for one reason; for the probe before a download, and the end of one."""

from clipkit.tfrecord_tools import reasons
from clipkit.tfrecord_tools.sample import EMPTY_CAPTION

ADVICE = {
    reasons.DNS: "names don't resolve: name other resolvers, such as --resolver 1.1.1.1 --resolver 8.8.8.8",
    reasons.CONNECT: "hosts can't be reached: check the network, a firewall or a proxy, and try fewer --connections",
    reasons.TIMEOUT: "answers come too late: try fewer --connections, or a longer --timeout",
    reasons.TLS: "certificates fail: check the machine's clock and its root certificates (SSL_CERT_FILE)",
    reasons.RATE_LIMITED: "hosts ask for patience: lower --per-host",
    reasons.HTTP_4XX: "links are dead or refused: an old table may be so",
    reasons.HTTP_5XX: "servers fail: try later",
    reasons.DISALLOWED: "hosts forbid the use of their images: they aren't to be taken",
    reasons.BLOCKED_ADDRESS: "URLs lead to private addresses: --allow-private-hosts, if these servers are your own",
    reasons.BAD_URL: "the column holds no http or https URLs: name another with --url-column",
    reasons.NOT_AN_IMAGE: "answers are no images: name another column with --url-column",
    EMPTY_CAPTION: "rows have no caption: name another column with --caption-column, or take --format webdataset",
}
# These are mended by another column or format, which makes another download.
ELSEWHERE = frozenset({reasons.BAD_URL, reasons.NOT_AN_IMAGE, EMPTY_CAPTION})


def way_on(reason: str) -> str:
    """What to do after a download in which nearly all failed for this reason."""
    advice = ADVICE.get(reason, f"most fail as {reason}")
    if reason in ELSEWHERE:
        return f"{advice}, and another output"
    if reason in reasons.PASSING | {reasons.BLOCKED_ADDRESS}:
        return f"{advice}; then the same command with --retry-failed tries again"
    return f"{advice}; the same command with --retry-failed={reason} tries again"
