"""Images, labels, cases and datasets: from files and back to files."""
