"""From records to tables, figures and tests of significance."""
