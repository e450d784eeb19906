-- resolution: 256
--
-- Everything that decodes and that somebody wrote a caption for: a start for fine-tuning sets, and the largest set to compare with.
SELECT
  basics.uid,
  basics.error IS NULL AS decoded, -- 2: nothing can be said about a broken file
  caption_source <> 'name' AND length(trim(caption)) >= 3 AS captioned -- 2: a file name made into words is no caption
FROM basics
