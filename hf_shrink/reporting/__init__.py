"""Tables, plots, the HTML report and the model card, all made from a report's data."""

from hf_shrink.reporting.card import model_card
from hf_shrink.reporting.html import report_html
from hf_shrink.reporting.progress import Progress, silence
from hf_shrink.reporting.table import plain_table, print_table
from hf_shrink.reporting.write import write_report

__all__ = ["Progress", "model_card", "plain_table", "print_table", "report_html", "silence", "write_report"]
