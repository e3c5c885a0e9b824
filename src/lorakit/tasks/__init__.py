"""Problems: how examples become batches, and how answers are judged. They know no device, optimizer or process."""
