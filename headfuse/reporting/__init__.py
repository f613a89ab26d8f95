"""Tables, model cards and the HTML report."""
