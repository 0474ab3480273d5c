"""One HTML page that shows how a segmentation holds up at every site, readable offline."""

from anysite.report.page import write_report

__all__ = ["write_report"]
